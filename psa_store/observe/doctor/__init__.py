"""Whether this machine, a Redis and a ZooKeeper are fit for a job: looks, judges, and says how to mend what is not."""

from psa_store.observe.doctor.check import Check, Verdict
from psa_store.observe.doctor.checks import visit

__all__ = ["Check", "Verdict", "visit"]
