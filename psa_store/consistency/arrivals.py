"""Updates on arrival (async, ssp) as a state machine: what a server has applied, may apply next, and must commit.

Theory of operation. Every shard counts, for each rank, the pushes that it has applied: its *clocks*. A rank numbers its
pushes 0, 1, 2, ..., and a shard takes each number once and in this order. So the clocks say exactly what is in a shard;
they are committed with it, and after any loss the pushes from the clocks on are what must come again. The *version* of
a shard is the sum of its clocks. Per shard::

    OPEN ──version is the next commit's──▶ DUE ──all shards here are copied──▶ OPEN

* OPEN: the pushes that wait are applied, one after the other as they came.
* DUE: nothing is applied until all shards here have come so far and are copied for the commit. Commits are due at the
  same versions for all shards of a job (multiples of an interval, where a hand-over stops, the end), so that a version
  which all shards have committed always exists, although two shards of one version may hold the pushes of different
  ranks.

A *cut* ends with a certain push of each rank, the same in all shards of the job: the worker that computes a rank says
where. From there on a rank is not applied until all ranks have come to that place and the shards are copied; they have
the same pushes then, and so one version, which is committed. (Aligned barriers, as in Carbone et al., "Lightweight
Asynchronous Snapshots for Distributed Dataflows", 2015.)

Invariants: no push counts twice in a shard, and none is left out (the clocks). With a bound, no rank starts step t
before all ranks have applied t - bound here; since that holds at every server, it holds for the job.

Nothing waits for ever: the rank with the lowest clock may always start, and a shard that waits for a commit version
gets there with pushes that other shards have already taken, so they are on their way or will be computed again.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from psa_store.consistency.instructions import (
    Applied,
    ApplyPushes,
    Commit,
    Committed,
    Copied,
    Copy,
    CopyDelayed,
    Event,
    Instruction,
    Offer,
    Push,
    RankCut,
    Report,
    Revised,
    Stage,
)
from psa_store.consistency.orders import Orders


class Arrivals:
    """The shards of one server. Not thread-safe.

    Args:
        clocks: by shard, how many pushes of each rank are in it.
        ahead_max: by how many steps a rank may be ahead of the slowest; None for any number.
        commit_interval: versions between two commits, at least 1.
        committed: the version that all shards of the job have committed, at which this term begins.
    """

    def __init__(
        self, clocks: Mapping[int, Sequence[int]], *, ahead_max: int | None, commit_interval: int, committed: int
    ) -> None:
        self._clocks = {shard: list(each) for shard, each in clocks.items()}
        self._ahead_max = ahead_max
        self._interval = commit_interval
        self._waiting: dict[int, deque[Push]] = {shard: deque() for shard in clocks}
        self._applying: Sequence[Push] = ()
        self._copying: Sequence[int] = ()
        self._copied_to = committed
        """The newest version for whose commit all shards have been copied."""
        self._copied: dict[int, list[int]] = {}
        """Shards that have been copied for the version after it, with their clocks."""
        self._to_commit: Commit | None = None
        self._stops: set[int] = set()
        self._cut_clocks: dict[int, int] = {}
        """By rank, how many of its pushes belong to the cut."""
        self._reports: list[Report] = []
        self._orders = Orders(committed)
        self.committed_clocks = self.clocks()
        """By rank, how many of its pushes are in the newest version that is durable here."""
        self._copied_clocks: dict[int, list[int]] = {}
        """The same by version that is being committed."""

    # --- pushes

    def offer(self, step: int, shard: int, rank: int) -> Offer:
        """Judge a push before its bytes are read. AHEAD: there are others of this rank to be applied first."""
        waiting = sum(push.rank == rank for push in self._waiting[shard])
        following = self._clocks[shard][rank] + waiting
        if step < following:
            return Offer.DUPLICATE
        return Offer.NEW if step == following and not waiting else Offer.AHEAD

    def accept(self, step: int, shard: int, rank: int, *, finite: bool = True) -> bool:
        """Record a push that has arrived whole; False if it is not wanted any more."""
        if self.offer(step, shard, rank) is not Offer.NEW:
            return False
        self._waiting[shard].append(Push(shard, rank, step, finite))
        return True

    # --- events

    def handle(self, event: Event) -> None:
        """Take what has happened; :meth:`ready` says what follows from it."""
        match event:
            case Applied():
                for push in self._applying:
                    self._waiting[push.shard].remove(push)
                    self._clocks[push.shard][push.rank] += 1
                self._applying = ()
            case Copied():
                self._on_copied()
            case CopyDelayed():
                self._copying = ()
            case Committed():
                self._orders.committed = event.version
                # Committed a second time, to be pinned, it may have been copied before the first was reported.
                self.committed_clocks = self._copied_clocks.pop(event.version, self.committed_clocks)
            case RankCut():
                self._on_rank_cut(event)
            case Revised():
                if self._orders.revise(event.plan):
                    self._cut_clocks.clear()
                if event.plan.stop_version is not None and not self._clocks:
                    self._orders.committed = event.plan.stop_version  # nothing here changes: it is there already
                elif event.plan.stop_version is not None:
                    self.commit_at(event.plan.stop_version)
            case _:
                raise AssertionError(f"{event} in a job whose pushes are applied on arrival")

    def _on_copied(self) -> None:
        self._copied.update({shard: list(self._clocks[shard]) for shard in self._copying})
        self._copying = ()
        if len(self._copied) < len(self._clocks):
            return
        version = self.commits_next
        cut = self._orders.take_cut() if version == self.cut else None
        if cut is not None:
            self._cut_clocks.clear()
        self._to_commit = Commit(version, cut)
        self._copied_clocks[version] = _least(self._copied.values())
        self._copied_to = version
        self._copied.clear()

    def _on_rank_cut(self, event: RankCut) -> None:
        """The cut ends with the first ``clock`` pushes of a rank; it is missed if more of them are in a shard."""
        if self._orders.cut is None or int(self._orders.cut.barrier) != event.barrier:
            return  # of a checkpoint that is over
        if any(clocks[event.rank] > event.clock for clocks in self._clocks.values()):
            self._reports += self._orders.miss()
            self._cut_clocks.clear()
            return
        self._cut_clocks[event.rank] = event.clock
        if self.cut is not None:
            if self._copied_to == self.cut:
                self._copied_to -= 1  # copied as any other version: once more, for the cut
            self._stops.add(self.cut)

    # --- what is to be done

    def ready(self, awaited: Collection[int] = (), *, may_copy: bool = True) -> list[Instruction]:
        """What to do now, in this order; nothing while something is being done to the shards.

        Args:
            awaited: versions that workers wait for to become durable.
            may_copy: False while the copies of the last commit are being written.
        """
        if self._applying or self._copying:
            return []
        orders = self._orders
        todo: list[Instruction] = [*self._reports]
        self._reports.clear()
        if self._to_commit is not None:
            todo.append(self._to_commit)
            self._to_commit = None
        if orders.cut is not None and not self._clocks:
            todo += orders.pin_nothing()
        for version in awaited:
            self.commit_at(version)
        if orders.waited_for:
            todo += orders.answers(self.version, self.newest)
            if orders.frozen:
                return todo
        if may_copy and (shards := self._to_copy()):
            self._copying = shards
            todo.append(Copy(self.commits_next, shards))
        elif pushes := self._due():
            self._applying = pushes
            todo.append(ApplyPushes(pushes))
        return todo

    def _due(self) -> list[Push]:
        """What can be applied now, one push per shard."""
        first = {
            shard: next((push for push in waiting if not self._is_held(push)), None)
            for shard, waiting in self._waiting.items()
            if self.version_of(shard) not in (self.commits_next, self._orders.stop_version)
        }
        return [push for push in first.values() if push is not None]

    def _is_held(self, push: Push) -> bool:
        """Whether it comes behind the cut in its rank."""
        return push.step >= self._cut_clocks.get(push.rank, push.step + 1)

    def _to_copy(self) -> list[int]:
        """Shards that stand at the version of the next commit and wait for being copied."""
        version = self.commits_next
        return [s for s in self._clocks if s not in self._copied and self.version_of(s) == version]

    @property
    def cut(self) -> int | None:
        """The version of the cut; None until all ranks have said it."""
        ranks = len(next(iter(self._clocks.values()), ()))
        return sum(self._cut_clocks.values()) if ranks and len(self._cut_clocks) == ranks else None

    # --- ranks

    def clocks(self) -> list[int]:
        """By rank, how many of its pushes are in every shard here."""
        return _least(self._clocks.values())

    @property
    def untouched(self) -> int:
        """The first step of which nothing has arrived here, of any rank."""
        arrived = [clock for clocks in self._clocks.values() for clock in clocks]
        waiting = [push.step + 1 for pushes in self._waiting.values() for push in pushes]
        return max([*arrived, *waiting], default=0)

    def may_start(self, step: int, rank: int) -> bool:
        """Whether a rank may read parameters for this step: its own pushes are in, and it is not too far ahead."""
        if not self._clocks:
            return True
        clocks = self.clocks()
        bound = 0 if self._ahead_max is None else step - self._ahead_max
        return clocks[rank] >= step and min(clocks) >= bound

    # --- versions and commits

    @property
    def stage(self) -> Stage:
        return Stage.APPLYING if self._applying else Stage.SNAPPING if self._copying else Stage.COLLECTING

    @property
    def stands_at(self) -> int | None:
        """The version at which all shards here stand whole; None if there is none."""
        return self.version if not self._applying and self.version == self.newest else None

    @property
    def committed(self) -> int:
        """The newest version that this server has made durable."""
        return self._orders.committed

    def version_of(self, shard: int) -> int:
        return sum(self._clocks[shard])

    @property
    def version(self) -> int:
        """The version that every shard here has reached."""
        return min((self.version_of(shard) for shard in self._clocks), default=self.committed)

    @property
    def newest(self) -> int:
        """The version that some shard here has reached."""
        return max((self.version_of(shard) for shard in self._clocks), default=self.committed)

    def commit_at(self, version: int) -> None:
        """Commit this version, too, unless a shard is beyond it: then a later one will do."""
        self._stops = {stop for stop in self._stops if stop > self._copied_to}
        if version >= self.newest:
            self._stops.add(version)

    @property
    def commits_next(self) -> int:
        """The version that is to be committed next."""
        multiple = (self._copied_to // self._interval + 1) * self._interval
        return min([multiple, *(stop for stop in self._stops if stop > self._copied_to)])


def _least(clocks: Iterable[Sequence[int]]) -> list[int]:
    """By rank, the least of some shards' clocks."""
    return [min(each) for each in zip(*clocks, strict=True)]
