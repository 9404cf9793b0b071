"""When a gradient counts, and who waits for whom, as state machines without I/O, threads, tensors or a clock.

``sync``: a step is the gradients of all ranks. ``arrival``: each push is an update of its own (async, ssp).
"""

from psa_store.consistency.arrivals import Arrivals, Update
from psa_store.consistency.offer import Offer
from psa_store.consistency.sync_step import RANK_OF_BUFFERS, ShardStage, SyncStep, Verdict

__all__ = ["RANK_OF_BUFFERS", "Arrivals", "Offer", "ShardStage", "SyncStep", "Update", "Verdict"]
