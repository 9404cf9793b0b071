"""Whether this machine, a Redis and a ZooKeeper are fit for a job, and how to mend what is not."""

from psa_store.observe.doctor.check import Check, Verdict
from psa_store.observe.doctor.checks import examine

__all__ = ["Check", "Verdict", "examine"]
