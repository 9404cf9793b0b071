"""What a job does at this moment, and what is not well: looks at ZooKeeper, Redis and its servers, as one model."""

from psa_store.observe.status.describe import PATIENCE_S_MAX, Observer, describe, known_jobs
from psa_store.observe.status.model import Finding, JobStatus, Severity

__all__ = ["PATIENCE_S_MAX", "Finding", "JobStatus", "Observer", "Severity", "describe", "known_jobs"]
