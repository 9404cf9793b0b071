"""The synchronous step as a state machine: what a server has of step t, and what it may do next.

Theory of operation. A server leads some of the shards. Per shard::

    COLLECTING ──all ranks in──▶ REDUCING ──▶ REDUCED ──▶ (applied: next step, COLLECTING)
        ▲                                        │
        └───────────── refused ──────────────────┘

and for the step as a whole, :meth:`SyncStep.verdict`:

* WAIT until *every* shard of the job, here and at the other servers, is reduced. Servers tell each other the
  squared norm of each shard that they reduced (0 for buffers); it serves the global clipping norm, the check for NaN
  and Inf, and the proof that the shard is complete.
* APPLY then, all shards alike; or SKIP, if a norm is not finite and the job's policy is to skip; or REFUSE the
  gradients of own shards that are not finite.

Invariant: a version t+1 of any shard exists only if all gradients of step t, of all shards, have arrived. So when a
worker dies, whoever computes its ranks again needs version t only while version t is everywhere, and nobody ever
needs a version older than the one that the servers hold.

A gradient is kept by (shard, rank); the first one wins, later ones are DUPLICATE. They are equal anyway.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import Enum, auto

RANK_OF_BUFFERS = 0
"""The rank whose buffers everyone gets, as in DistributedDataParallel."""


class Offer(Enum):
    """What to do with a gradient that a worker offers."""

    NEW = auto()
    DUPLICATE = auto()
    """Have it already, or its step is over: take the bytes off the wire and drop them."""
    AHEAD = auto()
    """Its step has not begun here, which a correct worker cannot know of: refuse."""


class Verdict(Enum):
    WAIT = auto()
    APPLY = auto()
    SKIP = auto()
    REFUSE = auto()


class ShardStage(Enum):
    COLLECTING = auto()
    REDUCING = auto()
    REDUCED = auto()


class SyncStep:
    """One server's view of the current step. Not thread-safe.

    Args:
        version: the version that all shards have now; the machine collects the gradients of this step.
        ranks: world size of the job.
        trained: the trained shards that this server leads.
        buffers: the buffer shards that it leads: only :data:`RANK_OF_BUFFERS` pushes them, nothing is reduced.
        all_shards: the trained and buffer shards of the whole job.
        skip_nonfinite: the job's policy for NaN and Inf.
    """

    def __init__(
        self,
        *,
        version: int,
        ranks: int,
        trained: Iterable[int],
        buffers: Iterable[int],
        all_shards: Iterable[int],
        skip_nonfinite: bool,
    ) -> None:
        self.version = version
        self._ranks = ranks
        self._trained = tuple(trained)
        self._buffers = frozenset(buffers)
        self._all_shards = tuple(sorted(all_shards))
        self._skip_nonfinite = skip_nonfinite
        self._norms: dict[int, float] = {}
        self._early_norms: dict[int, float] = {}
        self._arrived: dict[int, set[int]] = {}
        self._stage: dict[int, ShardStage] = {}
        self._start(version)

    def offer(self, step: int, shard: int, rank: int) -> Offer:
        """Judge a gradient before its bytes are read. Changes nothing: :meth:`accept` does, once they are here."""
        if step > self.version:
            return Offer.AHEAD
        if step < self.version or rank in self._arrived[shard]:
            return Offer.DUPLICATE
        if shard in self._buffers and rank != RANK_OF_BUFFERS:
            return Offer.DUPLICATE
        return Offer.NEW

    def accept(self, shard: int, rank: int) -> bool:
        """Record a gradient that has arrived whole. True: the shard is complete and must be reduced now."""
        arrived = self._arrived[shard]
        assert self._stage[shard] is ShardStage.COLLECTING and rank not in arrived
        arrived.add(rank)
        if len(arrived) < (1 if shard in self._buffers else self._ranks):
            return False
        self._stage[shard] = ShardStage.REDUCING
        if shard not in self._buffers:
            return True
        self.reduced(shard, 0.0)
        return False

    def reduced(self, shard: int, squared_norm: float) -> None:
        """Record that a complete shard has been reduced."""
        assert self._stage[shard] is ShardStage.REDUCING
        self._stage[shard] = ShardStage.REDUCED
        self._norms[shard] = squared_norm

    def own_norms(self) -> dict[int, float] | None:
        """The norms to tell the other servers, once all own shards are reduced; None before.

        Buffers count: a server that went ahead without those of another would leave it behind for good, if the only
        worker that had them died.
        """
        if any(stage is not ShardStage.REDUCED for stage in self._stage.values()):
            return None
        return {shard: self._norms[shard] for shard in self._stage}

    def hear(self, step: int, norms: Mapping[int, float]) -> None:
        """Record what another server says of its shards. It may be one step ahead of us, never more."""
        if step == self.version:
            self._norms.update(norms)
        elif step == self.version + 1:
            self._early_norms.update(norms)

    def verdict(self) -> Verdict:
        """What the step as a whole allows now."""
        if any(stage is not ShardStage.REDUCED for stage in self._stage.values()):
            return Verdict.WAIT
        if any(shard not in self._norms for shard in self._all_shards):
            return Verdict.WAIT
        if math.isfinite(sum(self._norms.values())):
            return Verdict.APPLY
        if self._skip_nonfinite:
            return Verdict.SKIP
        return Verdict.REFUSE if self.faulty() else Verdict.WAIT

    def norms_in_order(self) -> list[float]:
        """Squared norms of all shards in the order of shards, which is the order in which they are added."""
        return [self._norms[shard] for shard in self._all_shards]

    def faulty(self) -> list[int]:
        """Own shards whose reduced gradient is not finite."""
        return [s for s in self._trained if s in self._norms and not math.isfinite(self._norms[s])]

    def forget(self, shard: int) -> frozenset[int]:
        """Drop all gradients of a shard that was refused; returns the ranks that must push again."""
        dropped = frozenset(self._arrived[shard])
        self._arrived[shard] = set()
        self._stage[shard] = ShardStage.COLLECTING
        self._norms.pop(shard, None)
        return dropped

    def advance(self) -> None:
        """The step was applied or skipped: begin the next one."""
        assert self.verdict() in (Verdict.APPLY, Verdict.SKIP)
        self._start(self.version + 1)

    def _start(self, version: int) -> None:
        self.version = version
        self._norms, self._early_norms = self._early_norms, {}
        self._arrived = {shard: set() for shard in (*self._trained, *self._buffers)}
        self._stage = dict.fromkeys(self._arrived, ShardStage.COLLECTING)
