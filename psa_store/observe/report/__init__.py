"""What became of a job, for people: its course, its failures and what they cost, as numbers, a picture and a page.

Everything follows from what stands in Redis about the job: curve, events, checkpoints. Only ``picture`` needs
matplotlib, and nothing here reads or writes but :func:`write_report`.
"""

from psa_store.observe.report.run import Failure, Kept, Rollback, Run, Segment, State, describe_run
from psa_store.observe.report.summary import GOODPUT, summary
from psa_store.observe.report.writing import check_matplotlib, write_report

__all__ = [
    "GOODPUT",
    "Failure",
    "Kept",
    "Rollback",
    "Run",
    "Segment",
    "State",
    "check_matplotlib",
    "describe_run",
    "summary",
    "write_report",
]
