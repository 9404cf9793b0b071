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
worker dies, its ranks are computed again from version t only while version t is everywhere, and no worker ever needs
a version older than the one that the servers hold.

A gradient is kept by (shard, rank); the first one wins, later ones are DUPLICATE. They are equal anyway.

Two things can be otherwise. With backup ranks a shard is complete when the gradients of fewer ranks are in; the others
are DUPLICATE from then on, and which they are is a matter of luck. And not every shard need be pushed in every step:
one that is not is complete from the start.

What is done to the shards is one thing at a time (:class:`~psa_store.consistency.instructions.Stage`). A version that
is to be committed is copied before it may change: if storage is slower than training, training waits there.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum, auto

from psa_store.consistency.instructions import (
    Applied,
    Apply,
    Commit,
    Committed,
    Copied,
    Copy,
    CopyDelayed,
    Event,
    Follow,
    Hurry,
    Instruction,
    Measure,
    Measured,
    Memory,
    Move,
    Moved,
    NormsTold,
    Offer,
    Revised,
    Skip,
    Stage,
    TellNorms,
)
from psa_store.consistency.orders import Orders

RANK_OF_BUFFERS = 0
"""The rank whose buffers all workers get, as in DistributedDataParallel."""


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
        version: the version that all shards have now, durably; the machine collects the gradients of this step.
        ranks: world size of the job.
        trained: the trained shards that this server owns.
        buffers: the buffer shards that it owns: only :data:`RANK_OF_BUFFERS` pushes them, nothing is reduced. With
            ``backup`` the first rank's count.
        all_shards: the trained and buffer shards of the whole job.
        needs_norms: whether the norms of gradients matter, because they are clipped.
        backup: of how many ranks a shard does not wait for the gradients.
        pushed: by (trained shard, step), whether ranks push it; None: all are pushed in every step.
        commit_every: versions between two commits; 0 for none but those that are asked for.
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
        pushed: Callable[[int, int], bool] | None = None,
        commit_every: int = 0,
    ) -> None:
        self.version = version
        self.stage = Stage.COLLECTING
        self._ranks = ranks
        self._needed = ranks - backup
        self._backup = backup
        self._pushed = pushed
        self._trained = tuple(trained)
        self._buffers = frozenset(buffers)
        self._own = (*self._trained, *self._buffers)
        self._all_shards = tuple(sorted(all_shards))
        self._needs_norms = needs_norms
        self._commit_every = commit_every
        self._orders = Orders(version)
        self._copied_version = version
        """The newest version that was copied for a commit."""
        self._to_commit: Commit | None = None
        self._committing = False
        self._hurried = False
        self._told = False
        """Whether the other servers know the norms of this step."""
        self._norms: dict[int, float] = {}
        self._early_norms: dict[int, dict[int, float]] = {}
        """By step: those of steps in which other servers are already."""
        self._arrived: dict[int, set[int]] = {}
        self._stage: dict[int, ShardStage] = {}
        self._former_norms: dict[int, dict[int, float]] = {}
        """By step: those of the own shards in the step before this one."""
        self._start(version)

    # --- pushes

    def offer(self, step: int, shard: int, rank: int) -> Offer:
        """Judge a gradient before its bytes are read. Changes nothing: :meth:`accept` does, once they are here."""
        if step > self.version:
            return Offer.AHEAD
        if step < self.version or rank in self._arrived[shard] or self._stage[shard] is not ShardStage.COLLECTING:
            return Offer.DUPLICATE
        return Offer.NEW if self._may_bring(shard, rank) else Offer.DUPLICATE

    def accept(self, step: int, shard: int, rank: int, *, finite: bool = True) -> bool:
        """Record a gradient that has arrived whole; False if it is not wanted any more: another was faster."""
        if self.offer(step, shard, rank) is not Offer.NEW:
            return False
        arrived = self._arrived[shard]
        arrived.add(rank)
        if not finite:
            self._not_finite.add(shard)
        if len(arrived) == (1 if shard in self._buffers else self._needed):
            self._stage[shard] = ShardStage.MEASURING
            if self._needs_norms and shard not in self._buffers:
                self._to_measure.append(shard)
            else:
                self._complete(shard, 0.0)
        return True

    def clocks(self, ranks: int) -> list[int]:
        """By rank, how many of its steps have arrived whole here."""
        waiting = [shard for shard, stage in self._stage.items() if stage is ShardStage.COLLECTING]
        return [
            self.version + all(rank in self._arrived[shard] or not self._may_bring(shard, rank) for shard in waiting)
            for rank in range(ranks)
        ]

    @property
    def missing(self) -> Mapping[int, list[int]]:
        """By shard, the ranks whose gradients are waited for here."""
        return {
            shard: [rank for rank in range(self._ranks) if rank not in arrived and self._may_bring(shard, rank)]
            for shard, arrived in self._arrived.items()
            if self._stage[shard] is ShardStage.COLLECTING
        }

    @property
    def untold(self) -> list[int]:
        """Shards of other servers whose norms are waited for."""
        return [shard for shard in self._all_shards if shard not in self._norms and shard not in self._arrived]

    @property
    def untouched(self) -> int:
        """The first step of which nothing has arrived here."""
        return self.version + any(self._arrived.values())

    # --- events

    def handle(self, event: Event) -> None:
        """Take what has happened; :meth:`ready` says what follows from it."""
        match event:
            case Measured():
                for shard, squared_norm in event.squared_norms.items():
                    self._complete(shard, squared_norm)
            case NormsTold():
                self._on_norms(event)
            case Applied():
                self.stage = Stage.COLLECTING
                self._next()
            case Moved() | CopyDelayed():
                self.stage = Stage.COLLECTING
            case Copied():
                self.stage = Stage.COLLECTING
                self._copied_version = self.version
                self._to_commit = Commit(self.version, self._orders.take_cut() if self._is_cut() else None)
            case Committed():
                self._orders.committed, self._committing = event.version, False
            case Revised():
                self._orders.revise(event.plan)
            case _:
                raise AssertionError(f"{event} in a synchronous job")

    # --- what is to be done

    def ready(
        self, memory: Memory = Memory.FREE, awaited: Collection[int] = (), *, may_copy: bool = True
    ) -> list[Instruction]:
        """What to do now, in this order; nothing while something is being done to the shards.

        Args:
            memory: what is read of the present version where the next one will be written.
            awaited: versions that workers wait for to become durable.
            may_copy: False while the copies of the last commit are being written.
        """
        if self.stage is not Stage.COLLECTING:
            return []
        todo = self._catch_up()
        if self._to_commit is not None:
            todo.append(self._to_commit)
            self._to_commit, self._committing, self._hurried = None, True, False
        orders = self._orders
        if orders.cut is not None:
            if not self._own:
                todo += orders.pin_nothing()
            elif orders.cut.version is not None and self.version > orders.cut.version:
                todo += orders.miss()
        if self._to_measure:
            todo.append(Measure(tuple(self._to_measure)))
            self._to_measure.clear()
        if self._commit_is_due(awaited):
            if may_copy:
                self.stage = Stage.SNAPPING
                todo.append(Copy(self.version, self._own))
            return todo
        if not self._told and (norms := self.own_norms()) is not None:
            self._told = True
            todo.append(TellNorms(self.version, norms))
        if self._committing and not self._hurried and (orders.waited_for or self._is_awaited(awaited)):
            self._hurried = True
            todo.append(Hurry())
        if orders.waited_for:
            todo += orders.answers(self.version, self.version)
            if orders.frozen or orders.stopped(self.version):
                return todo
        verdict = self.verdict()
        if verdict is Verdict.SKIP:
            todo.append(Skip(self.version))
            self._next()
        elif verdict is Verdict.APPLY and memory is Memory.READ_BY_OTHERS:
            self.stage = Stage.MOVING
            todo.append(Move())
        elif verdict is Verdict.APPLY and memory is Memory.FREE:
            self.stage = Stage.APPLYING
            todo.append(Apply(self.version, [self._norms[shard] for shard in self._all_shards]))
        return todo

    def verdict(self) -> Verdict:
        """What the step as a whole allows now."""
        if self._left or len(self._norms) < len(self._all_shards):
            return Verdict.WAIT
        return Verdict.APPLY if math.isfinite(sum(self._norms.values())) else Verdict.SKIP

    def own_norms(self) -> dict[int, float] | None:
        """The norms to tell the other servers, once all own shards are complete; None before.

        Buffers count: a server that went ahead without those of another would leave it behind for good, if the only
        worker that had them died.
        """
        return None if self._left else {shard: self._norms[shard] for shard in self._stage}

    def norms_to_repeat(self) -> dict[int, dict[int, float]]:
        """By step, the norms that a server may lack to which the connection broke.

        It may be a step behind, and wait for those of the step before; it is never further behind, since this server
        could not be here without its norms.
        """
        own = self.own_norms()
        present = {} if own is None else {self.version: own}
        return {**self._former_norms, **present}

    @property
    def committed(self) -> int:
        """The newest version that this server has made durable."""
        return self._orders.committed

    @property
    def stands_at(self) -> int | None:
        """The version at which all shards here stand whole; None in the middle of an update."""
        return None if self.stage is Stage.APPLYING else self.version

    # --- inside

    def _may_bring(self, shard: int, rank: int) -> bool:
        """Buffers come from one rank. With backup ranks none is waited for, so the first one's will do."""
        return shard not in self._buffers or rank == RANK_OF_BUFFERS or self._backup > 0

    def _complete(self, shard: int, squared_norm: float) -> None:
        assert self._stage[shard] is ShardStage.MEASURING
        self._stage[shard] = ShardStage.COMPLETE
        self._norms[shard] = math.nan if shard in self._not_finite else squared_norm
        self._left -= 1

    def _on_norms(self, told: NormsTold) -> None:
        """Another server may be one step ahead, never more; of one that owns nothing that changes, any number."""
        if self.version <= told.step <= self.version + 1 or (not self._own and told.step > self.version):
            place = self._norms if told.step == self.version else self._early_norms.setdefault(told.step, {})
            others = set(self._all_shards).difference(self._own)
            place.update({shard: norm for shard, norm in told.squared_norms.items() if shard in others})

    def _catch_up(self) -> list[Instruction]:
        """Where nothing changes, be in the newest step that another server is in: none waits for this one.

        Its version counts all the same, at the end of a job and in hand-overs. What it has missed, since it was slow or
        a connection broke, is not told again.
        """
        if self._own or not self._early_norms:
            return []
        self._start(max(self._early_norms))
        return [Follow(self.version)]

    def _is_cut(self) -> bool:
        """Whether a checkpoint is to be taken at this version."""
        return self._orders.cut is not None and self._orders.cut.version == self.version

    def _is_awaited(self, awaited: Collection[int]) -> bool:
        return bool(awaited) and min(awaited) <= self.version

    def _commit_is_due(self, awaited: Collection[int]) -> bool:
        if self._is_cut():
            return True  # also if it is committed already: to be pinned it is committed once more
        if self.version in (self._copied_version, self._orders.committed):
            return False
        return (
            (self._commit_every > 0 and self.version % self._commit_every == 0)
            or self.version == self._orders.stop_version
            or self._is_awaited(awaited)
        )

    def _next(self) -> None:
        """The step was applied or skipped: begin the next one."""
        own = self.own_norms()
        assert own is not None
        self._former_norms = {self.version: own}
        self._start(self.version + 1)

    def _start(self, version: int) -> None:
        self.version = version
        self._told = False
        self._norms = self._early_norms.pop(version, {})
        self._early_norms = {step: norms for step, norms in self._early_norms.items() if step > version}
        self._not_finite: set[int] = set()
        self._to_measure: list[int] = []
        self._arrived = {shard: set() for shard in self._own}
        self._stage = dict.fromkeys(self._arrived, ShardStage.COLLECTING)
        self._left = len(self._own)
        """Own shards that are not complete."""
        if self._pushed is not None:
            for shard in self._trained:
                if not self._pushed(shard, version):
                    self._stage[shard] = ShardStage.MEASURING
                    self._complete(shard, 0.0)
