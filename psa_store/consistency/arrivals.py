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

Nobody waits for ever: the rank with the lowest clock may always start, and a shard that waits for a commit version gets
there with pushes that other shards have already taken, so they are on their way or will be computed again.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from psa_store.consistency.offer import Offer


@dataclass(frozen=True, slots=True)
class Update:
    """The push of one rank, to be applied to one shard."""

    shard: int
    rank: int
    step: int
    finite: bool


class Arrivals:
    """The shards of one server. Not thread-safe.

    Args:
        clocks: by shard, how many pushes of each rank are in it.
        lead_max: by how many steps a rank may be ahead of the slowest; None for any number.
        commit_interval: versions between two commits, at least 1.
        committed: the version that all shards of the job have committed, at which this term begins.
    """

    def __init__(
        self, clocks: Mapping[int, Sequence[int]], *, lead_max: int | None, commit_interval: int, committed: int
    ) -> None:
        self._clocks = {shard: list(each) for shard, each in clocks.items()}
        self._lead_max = lead_max
        self._interval = commit_interval
        self._waiting: dict[int, deque[Update]] = {shard: deque() for shard in clocks}
        self._copied_to = committed
        """The newest version for whose commit all shards have been copied."""
        self._copied: set[int] = set()
        """Shards that have been copied for the version after it."""
        self._stops: set[int] = set()
        self._cut_clocks: dict[int, int] = {}
        """By rank, how many of its pushes belong to the cut."""
        self.limit: int | None = None
        """Apply nothing beyond this version; no shard is."""

    # --- pushes

    def offer(self, step: int, shard: int, rank: int) -> Offer:
        """Judge a push before its bytes are read. AHEAD: there are others of this rank to be applied first."""
        waiting = sum(update.rank == rank for update in self._waiting[shard])
        following = self._clocks[shard][rank] + waiting
        if step < following:
            return Offer.DUPLICATE
        return Offer.NEW if step == following and not waiting else Offer.AHEAD

    def accept(self, step: int, shard: int, rank: int, *, finite: bool = True) -> None:
        """Record a push that has arrived whole."""
        assert self.offer(step, shard, rank) is Offer.NEW
        self._waiting[shard].append(Update(shard, rank, step, finite))

    def due(self) -> list[Update]:
        """What can be applied now, one update per shard; say :meth:`applied` of each."""
        first = {
            shard: next((update for update in waiting if not self._is_held(update)), None)
            for shard, waiting in self._waiting.items()
            if self.version_of(shard) not in (self.commits_next, self.limit)
        }
        return [update for update in first.values() if update is not None]

    def _is_held(self, update: Update) -> bool:
        """Whether it comes behind the cut in its rank."""
        return update.step >= self._cut_clocks.get(update.rank, update.step + 1)

    def applied(self, update: Update) -> None:
        """The update is in the shard."""
        self._waiting[update.shard].remove(update)
        self._clocks[update.shard][update.rank] += 1

    # --- a cut

    def cut_rank(self, rank: int, clock: int) -> bool:
        """The cut ends with the first ``clock`` pushes of a rank; False if more of them are in a shard already."""
        if any(clocks[rank] > clock for clocks in self._clocks.values()):
            return False
        self._cut_clocks[rank] = clock
        if self.cut is not None:
            if self._copied_to == self.cut:
                self._copied_to -= 1  # copied as any other version: once more, for the cut
            self._stops.add(self.cut)
        return True

    def forget_cut(self) -> None:
        """There is no cut, or it is copied: all go on."""
        self._cut_clocks.clear()

    @property
    def cut(self) -> int | None:
        """The version of the cut; None until all ranks have said it."""
        ranks = len(next(iter(self._clocks.values()), ()))
        return sum(self._cut_clocks.values()) if ranks and len(self._cut_clocks) == ranks else None

    # --- ranks

    def clocks(self) -> list[int]:
        """By rank, how many of its pushes are in every shard here."""
        return [min(each) for each in zip(*self._clocks.values(), strict=True)]

    def may_start(self, step: int, rank: int) -> bool:
        """Whether a rank may read parameters for this step: its own pushes are in, and it is not too far ahead."""
        clocks = self.clocks()
        bound = 0 if self._lead_max is None else step - self._lead_max
        return clocks[rank] >= step and min(clocks) >= bound

    # --- versions and commits

    def version_of(self, shard: int) -> int:
        return sum(self._clocks[shard])

    @property
    def version(self) -> int:
        """The version that every shard here has reached."""
        return min((self.version_of(shard) for shard in self._clocks), default=self._copied_to)

    @property
    def newest(self) -> int:
        """The version that some shard here has reached."""
        return max((self.version_of(shard) for shard in self._clocks), default=self._copied_to)

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

    def to_copy(self) -> list[int]:
        """Shards that stand at this version and wait for being copied; say :meth:`copied` of them."""
        version = self.commits_next
        return [s for s in self._clocks if s not in self._copied and self.version_of(s) == version]

    def copied(self, shards: Iterable[int]) -> bool:
        """The state of these shards at :attr:`commits_next` is copied; True if that was the last of them."""
        self._copied.update(shards)
        if len(self._copied) < len(self._clocks):
            return False
        self._copied_to = self.commits_next
        self._copied.clear()
        return True
