"""When a gradient counts, and what waits for what, as state machines without I/O, threads, tensors or a clock.

A server's side: ``sync_step`` (a step is the gradients of all ranks), ``arrivals`` (each push is an update of its own).
Both judge what is offered (``offer``, ``accept``), take events (``handle``), and say what is to be done (``ready``).
A worker's side: ``worker_step`` (sync), ``worker_pushes`` (async, ssp), ``rounds`` (local). Each has one caller, a
strategy of :mod:`psa_store.worker.strategy`, so each event is a method; what is to be done is said by ``next``. Both
sides: ``rank_state``.
"""

from psa_store.consistency.arrivals import Arrivals
from psa_store.consistency.instructions import Memory, Offer, Push, Stage
from psa_store.consistency.rank_state import push_brings_rank_state
from psa_store.consistency.sync_step import RANK_OF_BUFFERS, SyncStep

__all__ = [
    "RANK_OF_BUFFERS",
    "Arrivals",
    "Memory",
    "Offer",
    "Push",
    "Stage",
    "SyncStep",
    "push_brings_rank_state",
]
