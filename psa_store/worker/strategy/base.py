"""What a worker asks of its job's mode: which rank's step comes next, and what becomes of its gradient.

A strategy lives as long as the worker, in the thread that runs the model. It listens to servers only in
:meth:`Strategy.next_rank_step` and :meth:`Strategy.hand_over`, so the model cannot change under a running forward or
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from psa_store.errors import Refused
from psa_store.job.layout import Shard
from psa_store.observe.formatting import names
from psa_store.wire import Flag, Header
from psa_store.worker.batches import RankStep
from psa_store.worker.flat_model import FlatModel
from psa_store.worker.session import PlanSession


class Strategy(Protocol):
    """How this worker's ranks go on, step by step. The worker calls the methods in this order."""

    @property
    def session(self) -> PlanSession: ...

    @property
    def version(self) -> int:
        """Steps that the parameters in the model have behind them."""

    def next_rank_step(self) -> RankStep | None:
        """The next (step, rank) to compute, with its parameters in the model; None: finished, or told to leave."""

    def begin(self, rank_step: RankStep) -> None:
        """Its batch is here. Gradients may be pushed from now on, in the middle of backward."""

    def hand_over(self) -> None:
        """Backward is over.

        Raises:
            NonFiniteGradient: the gradient holds NaN or Inf and the job refuses such.
        """


def describe(awaits: tuple[int, Iterable[str]] | None) -> str:
    """A version that is awaited, and the servers that have not brought it, for people; empty if there is none."""
    return "" if awaits is None else f"version {awaits[0]} from {names(sorted(awaits[1]))}"


def place_parameters(model: FlatModel, header: Header, shard: Shard) -> memoryview:
    """Name the model's own memory for a shard that comes by value."""
    if header.flags & Flag.MOVEMENT:
        raise Refused(f"a movement of shard {shard.index}, in a job that publishes none")
    return model.place(shard)
