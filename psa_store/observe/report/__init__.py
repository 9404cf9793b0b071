"""What became of a job: its curve, its failures and what they cost, as numbers, a picture and a page.

Everything follows from what stands in Redis about the job: curve, events, checkpoints. Only ``picture`` needs
matplotlib, and nothing here reads or writes but :func:`write_report`.
"""

from psa_store.observe.report.run import Run, describe_run
from psa_store.observe.report.summary import facts, pause, to_json
from psa_store.observe.report.timeline import State
from psa_store.observe.report.writing import check_matplotlib, write_report

__all__ = ["Run", "State", "check_matplotlib", "describe_run", "facts", "pause", "to_json", "write_report"]
