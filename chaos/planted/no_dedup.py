"""A gradient that comes twice counts twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from psa_store.consistency import RANK_OF_BUFFERS, Offer, SyncStep
from psa_store.optim.note import PLAIN, GradientNote
from psa_store.server.shard import OwnedShard


def plant() -> None:
    """Make servers take every push of the present step, and sum all pushes of one rank."""
    offer, accept, take, apply = SyncStep.offer, SyncStep.accept, OwnedShard.take_gradient, OwnedShard.apply

    def take_all(self: SyncStep, step: int, shard: int, rank: int) -> Offer:
        found = offer(self, step, shard, rank)
        again = found is Offer.DUPLICATE and step == self.version and shard in self._trained
        return Offer.NEW if again else found

    def accept_again(self: SyncStep, step: int, shard: int, rank: int, *, finite: bool = True) -> bool:
        if step == self.version and shard in self._trained and rank in self._arrived[shard]:
            return True
        return accept(self, step, shard, rank, finite=finite)

    fresh: set[tuple[int, int]] = set()

    def add(self: OwnedShard, rank: int, gradient: Tensor, note: GradientNote = PLAIN) -> None:
        key = (self.shard.index, rank)
        if key in fresh and not (self.shard.role.name == "BUFFER" and rank == RANK_OF_BUFFERS):
            gradient = gradient + self._gradients[rank]
        fresh.add(key)
        take(self, rank, gradient, note)

    def apply_and_forget(self: OwnedShard, *arguments: Any, **named: Any) -> None:
        fresh.difference_update({each for each in fresh if each[0] == self.shard.index})
        apply(self, *arguments, **named)

    SyncStep.offer = take_all  # type: ignore[method-assign]
    SyncStep.accept = accept_again  # type: ignore[method-assign]
    OwnedShard.take_gradient = add  # type: ignore[method-assign]
    OwnedShard.apply = apply_and_forget  # type: ignore[method-assign]
