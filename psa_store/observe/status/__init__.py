"""What a job does at this moment, and what is sick about it: looks at ZooKeeper, Redis and its servers, as data."""

from psa_store.observe.status.describe import PATIENCE_S_MAX, Observer, describe, known_jobs
from psa_store.observe.status.diagnosis import Finding, Severity, diagnose

__all__ = ["PATIENCE_S_MAX", "Finding", "Observer", "Severity", "describe", "diagnose", "known_jobs"]
