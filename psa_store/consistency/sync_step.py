"""The synchronous step as a state machine: what a server has of step t, and what it may do next.

Theory of operation. A server owns some of the shards. Per shard::

    COLLECTING ──all ranks in──▶ MEASURING ──▶ COMPLETE ──▶ (applied: next step, COLLECTING)

and for the step as a whole, :meth:`SyncStep.verdict`:

* WAIT until *every* shard of the job, here and at the other servers, is complete. Servers tell each other the squared
  norm of each complete shard's mean gradient (0 for buffers, and where nothing is clipped; NaN if a rank said that its
  gradient is not finite). It serves the global clipping norm, and it is the proof that the shard is complete.
* APPLY then, all shards alike; or SKIP, all shards alike, if a norm is not finite. (In a job that does not skip, the
  worker that computed such a gradient fails, and does not push it.)

Invariant: a version t+1 of any shard exists only if all gradients of step t, of all shards, have arrived. So when a
worker dies, whoever computes its ranks again needs version t only while version t is everywhere, and nobody ever
needs a version older than the one that the servers hold.

A gradient is kept by (shard, rank); the first one wins, later ones are DUPLICATE. They are equal anyway.

Two things can be otherwise. With backup ranks a shard is complete when the gradients of fewer ranks are in; the others
are DUPLICATE from then on, and which they are is a matter of luck. And not every shard need be pushed in every step:
one that is not is complete from the start.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto

from psa_store.consistency.offer import Offer

RANK_OF_BUFFERS = 0
"""The rank whose buffers everyone gets, as in DistributedDataParallel."""


class Verdict(Enum):
    WAIT = auto()
    APPLY = auto()
    SKIP = auto()


class ShardStage(Enum):
    COLLECTING = auto()
    MEASURING = auto()
    COMPLETE = auto()


class SyncStep:
    """One server's view of the current step. Not thread-safe.

    Args:
        version: the version that all shards have now; the machine collects the gradients of this step.
        ranks: world size of the job.
        trained: the trained shards that this server owns.
        buffers: the buffer shards that it owns: only :data:`RANK_OF_BUFFERS` pushes them, nothing is reduced. With
            ``backup`` the first rank's count.
        all_shards: the trained and buffer shards of the whole job.
        needs_norms: whether the norms of gradients matter, because they are clipped.
        backup: of how many ranks a shard does not wait for the gradients.
        pushed: by (trained shard, step), whether ranks push it.
    """

    def __init__(
        self,
        *,
        version: int,
        ranks: int,
        trained: Iterable[int],
        buffers: Iterable[int],
        all_shards: Iterable[int],
        needs_norms: bool,
        backup: int = 0,
        pushed: Callable[[int, int], bool] = lambda _shard, _step: True,
    ) -> None:
        self.version = version
        self._needed = ranks - backup
        self._backup = backup
        self._pushed = pushed
        self._trained = tuple(trained)
        self._buffers = frozenset(buffers)
        self._all_shards = tuple(sorted(all_shards))
        self._needs_norms = needs_norms
        self._norms: dict[int, float] = {}
        self._early_norms: dict[int, float] = {}
        self._arrived: dict[int, set[int]] = {}
        self._stage: dict[int, ShardStage] = {}
        self._former_norms: dict[int, dict[int, float]] = {}
        """By step: ours of the step before this one."""
        self._start(version)

    def offer(self, step: int, shard: int, rank: int) -> Offer:
        """Judge a gradient before its bytes are read. Changes nothing: :meth:`accept` does, once they are here."""
        if step > self.version:
            return Offer.AHEAD
        if step < self.version or rank in self._arrived[shard] or self._stage[shard] is not ShardStage.COLLECTING:
            return Offer.DUPLICATE
        if shard in self._buffers and not self._brings_buffers(rank):
            return Offer.DUPLICATE
        return Offer.NEW

    def accept(self, shard: int, rank: int, *, finite: bool = True) -> bool:
        """Record a gradient that has arrived whole. True: now measure the shard, and call :meth:`measured`."""
        arrived = self._arrived[shard]
        assert self._stage[shard] is ShardStage.COLLECTING and rank not in arrived
        arrived.add(rank)
        if not finite:
            self._not_finite.add(shard)
        if len(arrived) < (1 if shard in self._buffers else self._needed):
            return False
        self._stage[shard] = ShardStage.MEASURING
        if self._needs_norms and shard not in self._buffers:
            return True
        self.measured(shard, 0.0)
        return False

    def measured(self, shard: int, squared_norm: float) -> None:
        """Record the squared norm of a shard that all ranks have pushed."""
        assert self._stage[shard] is ShardStage.MEASURING
        self._stage[shard] = ShardStage.COMPLETE
        self._norms[shard] = math.nan if shard in self._not_finite else squared_norm

    def _brings_buffers(self, rank: int) -> bool:
        """With backup ranks nobody is waited for, so the first one's will do."""
        return rank == RANK_OF_BUFFERS or self._backup > 0

    def clocks(self, ranks: int) -> list[int]:
        """By rank, how many of its steps have arrived whole here."""
        waiting = [shard for shard, stage in self._stage.items() if stage is ShardStage.COLLECTING]
        return [
            self.version
            + all(
                rank in self._arrived[shard] or (shard in self._buffers and not self._brings_buffers(rank))
                for shard in waiting
            )
            for rank in range(ranks)
        ]

    def own_norms(self) -> dict[int, float] | None:
        """The norms to tell the other servers, once all own shards are complete; None before.

        Buffers count: a server that went ahead without those of another would leave it behind for good, if the only
        worker that had them died.
        """
        if any(stage is not ShardStage.COMPLETE for stage in self._stage.values()):
            return None
        return {shard: self._norms[shard] for shard in self._stage}

    def norms_to_repeat(self) -> dict[int, dict[int, float]]:
        """By step, the norms that a server may lack to which the connection broke.

        It may be a step behind, and wait for those of the step before; it is never further behind, since we could not
        be here without its own.
        """
        own = self.own_norms()
        present = {} if own is None else {self.version: own}
        return {**self._former_norms, **present}

    def on_norms(self, step: int, norms: Mapping[int, float]) -> None:
        """Record what another server says of its shards. It may be one step ahead of us, never more."""
        if step == self.version:
            self._norms.update(norms)
        elif step == self.version + 1:
            self._early_norms.update(norms)

    def verdict(self) -> Verdict:
        """What the step as a whole allows now."""
        if any(stage is not ShardStage.COMPLETE for stage in self._stage.values()):
            return Verdict.WAIT
        if any(shard not in self._norms for shard in self._all_shards):
            return Verdict.WAIT
        return Verdict.APPLY if math.isfinite(sum(self._norms.values())) else Verdict.SKIP

    def norms_in_order(self) -> list[float]:
        """Squared norms of all shards in the order of shards, which is the order in which they are added."""
        return [self._norms[shard] for shard in self._all_shards]

    def advance(self) -> None:
        """The step was applied or skipped: begin the next one."""
        assert self.verdict() in (Verdict.APPLY, Verdict.SKIP)
        own = self.own_norms()
        assert own is not None
        self._former_norms = {self.version: own}
        self._start(self.version + 1)

    def _start(self, version: int) -> None:
        self.version = version
        self._norms, self._early_norms = self._early_norms, {}
        self._not_finite: set[int] = set()
        self._arrived = {shard: set() for shard in (*self._trained, *self._buffers)}
        self._stage = dict.fromkeys(self._arrived, ShardStage.COLLECTING)
        for shard in self._trained:
            if not self._pushed(shard, version):
                self._stage[shard] = ShardStage.COMPLETE
                self._norms[shard] = 0.0
