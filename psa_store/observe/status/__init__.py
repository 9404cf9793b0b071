"""What a job does at this moment, and what is not well: looks at ZooKeeper, Redis and its servers, as one model."""

from psa_store.observe.status.describe import PATIENCE_S_MAX, Observer, describe, known_jobs
from psa_store.observe.status.diagnosis import diagnose
from psa_store.observe.status.model import Finding, JobState, JobStatus, Severity

__all__ = [
    "PATIENCE_S_MAX",
    "Finding",
    "JobState",
    "JobStatus",
    "Observer",
    "Severity",
    "describe",
    "diagnose",
    "known_jobs",
]
