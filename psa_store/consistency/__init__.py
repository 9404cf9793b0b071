"""When a gradient counts, and what waits for what, as state machines without I/O, threads, tensors or a clock.

A server's side: ``sync_step`` (a step is the gradients of all ranks), ``arrivals`` (each push is an update of its own).
A worker's side: ``worker_step`` (sync), ``worker_pushes`` (async, ssp), ``rounds`` (local). They take events and give
instructions: one loop in :mod:`psa_store.worker.strategy` executes those of each. Both sides: ``rank_state``.
"""

from psa_store.consistency.arrivals import Arrivals, Update
from psa_store.consistency.offer import Offer
from psa_store.consistency.rank_state import push_brings_rank_state
from psa_store.consistency.sync_step import RANK_OF_BUFFERS, ShardStage, SyncStep, Verdict

__all__ = [
    "RANK_OF_BUFFERS",
    "Arrivals",
    "Offer",
    "ShardStage",
    "SyncStep",
    "Update",
    "Verdict",
    "push_brings_rank_state",
]
