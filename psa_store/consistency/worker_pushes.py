"""A worker's part where pushes are applied on arrival (async, ssp): which rank is next, and which pushes are kept.

Theory of operation. A rank's pushes are numbered by its steps. Servers tell how many of each rank they have
(``applied``), and how many are in a version that they have committed. A push is *durable* once all servers have
committed a version that contains it. Until then it is kept, since a term may begin from an older commit::

    pushed ──▶ kept ──all servers have committed it──▶ Drop
                └──a term begins, and servers lack it──▶ PushAgain, in order ──▶ kept

A rank whose kept pushes fill the ``window`` waits. :meth:`WorkerPushes.next` gives each rank its turn, the one that is
behind first: what a rank waits for may be the push of another one that is held here. Before its turn the parameters
have to come (Bring), and if they do not come soon, another rank is tried.

Each push counts once in the end, whatever happens: servers drop what they have, and if the worker dies, the next holder
of a rank computes its lost steps again.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from psa_store.consistency.worker_instructions import LISTEN, AskClocks, Compute, Finish, Listen


@dataclass(frozen=True, slots=True)
class Drop:
    """Keep a push no longer. ``durable``: it counts; otherwise the rank is another worker's now, or goes back."""

    rank: int
    step: int
    durable: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """What else is kept of a rank is void."""

    rank: int


@dataclass(frozen=True, slots=True)
class Bring:
    """Have the parameters with which a rank pushes this step."""

    rank: int
    step: int


@dataclass(frozen=True, slots=True)
class PushAgain:
    """Push what is kept of this step."""

    rank: int
    step: int


Instruction = AskClocks | Bring | PushAgain | Compute | Finish | Listen


class WorkerPushes:
    """Where the ranks of one worker stand. Not thread-safe.

    Args:
        last: how many steps each rank makes; None: any number.
        window: how many pushes of a rank may be kept before it waits.
    """

    def __init__(self, last: int | None, window: int) -> None:
        self._last = last
        self._window = window
        self._owners: frozenset[str] = frozenset()
        self._held: list[int] = []
        self.clocks: dict[int, int] = {}
        """By held rank, the step that comes next."""
        self._kept: dict[int, deque[int]] = {}
        self._again: dict[int, deque[int]] = {}
        """What is to be pushed again, one after the other: each when the servers have the one before."""
        self._applied: dict[str, Sequence[int]] = {}
        self._committed: dict[str, dict[int, Sequence[int]]] = {}
        """By server and version that it has committed, how many pushes of each rank are in it."""
        self._here: tuple[int, int] | None = None
        """The rank that has its turn, and its step."""
        self._tried: set[int] = set()

    @property
    def all_told(self) -> bool:
        """Whether all owners have told their clocks since they were asked."""
        return self._applied.keys() >= self._owners

    def to_push_again(self) -> dict[int, Sequence[int]]:
        """By rank, the steps to be pushed again."""
        return {rank: tuple(steps) for rank, steps in self._again.items() if steps}

    # --- what has happened; some return what need not be kept any more

    def ends_at(self, last: int | None) -> None:
        """Each rank makes another number of steps than was known."""
        self._last = last

    def term_begun(self, owners: frozenset[str]) -> None:
        """A term begins with these owners. What servers told before says nothing any more."""
        self._owners = owners
        self._committed.clear()

    def asked(self) -> None:
        """The owners were asked for their clocks."""
        self._applied.clear()

    def told(self, server: str, version: int, applied: Sequence[int], committed: Sequence[int]) -> list[Drop | Forget]:
        """An owner says: of each rank, how many pushes it has, and how many are in ``version``, which is committed."""
        self._applied[server] = applied
        self._committed.setdefault(server, {})[version] = committed
        return self._drop_durable()

    def compared(self) -> list[Drop | Forget]:
        """All owners have told where they are at the beginning of the term."""
        return [drop for rank in list(self.clocks) for drop in self._take_up(rank, self._applied_of(rank))]

    def planned(self, held: Collection[int]) -> list[Drop | Forget]:
        """The ranks that the plan gives to this worker."""
        self._held = sorted(held)
        return [drop for rank in self.clocks.keys() - set(held) for drop in self._forget(rank)]

    def started(self) -> None:
        """All owners have told where the ranks are that came."""
        for rank in self._held:
            if rank not in self.clocks:
                self._start(rank, self._applied_of(rank))

    def here(self, rank: int, step: int) -> None:
        """The parameters with which a rank pushes this step are in the model."""
        self._here = rank, step

    def not_here(self, rank: int) -> None:
        """They did not come soon."""
        self._tried.add(rank)

    def pushed(self, rank: int) -> None:
        """A rank has made a push, or has made one again."""
        self._here = None
        self._tried.clear()
        if self._again[rank]:
            self._again[rank].popleft()
        else:
            self._kept[rank].append(self.clocks[rank])
            self.clocks[rank] += 1

    def lost(self) -> None:
        """The connections are gone."""
        self._here = None
        self._tried.clear()

    # --- what is to be done

    def next(self) -> Instruction:
        """What to do now."""
        if any(rank not in self.clocks for rank in self._held):
            return AskClocks(self._owners)
        todo = [
            rank for rank in self._held if self._again[rank] or self._last is None or self.clocks[rank] < self._last
        ]
        if not todo:
            return LISTEN if self._last is None else Finish(self._last)
        if self._here is not None:
            rank, step = self._here
            if self._comes(rank) == step:
                return PushAgain(rank, step) if self._again[rank] else Compute(step, rank)
        free = [rank for rank in todo if self._again[rank] or len(self._kept[rank]) < self._window]
        if not free:
            return LISTEN
        if self._tried.issuperset(free):
            self._tried.clear()
        rank = min((each for each in free if each not in self._tried), key=lambda each: (self._comes(each), each))
        return Bring(rank, self._comes(rank))

    def _comes(self, rank: int) -> int:
        """The step that a rank pushes next."""
        return self._again[rank][0] if self._again[rank] else self.clocks[rank]

    def _applied_of(self, rank: int) -> int:
        return min((clocks[rank] for clocks in self._applied.values()), default=0)

    def _start(self, rank: int, step: int) -> None:
        """Hold a rank from this step on."""
        self.clocks[rank] = step
        self._kept[rank] = deque()
        self._again[rank] = deque()

    def _forget(self, rank: int) -> list[Drop | Forget]:
        """The rank is another worker's now, and so is the care for its pushes."""
        del self.clocks[rank], self._again[rank]
        if self._here is not None and self._here[0] == rank:
            self._here = None
        return [Forget(rank), *(Drop(rank, step, durable=False) for step in self._kept.pop(rank))]

    def _take_up(self, rank: int, start: int) -> list[Drop | Forget]:
        """Go on with a rank of which the servers have the pushes below ``start``."""
        kept = self._kept[rank]
        whole = start == self.clocks[rank] or (len(kept) > 0 and kept[0] <= start < self.clocks[rank])
        if whole:
            self._again[rank] = deque(step for step in kept if step >= start)
            return []
        # Others held the rank meanwhile, and what they pushed is not here: compute these steps again.
        drops = self._forget(rank)
        self._start(rank, start)
        return drops

    def _drop_durable(self) -> list[Drop | Forget]:
        """Keep no longer what all servers have committed."""
        if not self._committed.keys() >= self._owners:
            return []
        common = set.intersection(*(set(self._committed[server]) for server in self._owners))
        if not common:
            return []
        version = max(common)
        for server in self._owners:
            self._committed[server] = {v: c for v, c in self._committed[server].items() if v >= version}
        drops: list[Drop | Forget] = []
        for rank, kept in self._kept.items():
            durable = min(self._committed[server][version][rank] for server in self._owners)
            while kept and kept[0] < durable:
                drops.append(Drop(rank, kept.popleft(), durable=True))
            while self._again[rank] and self._again[rank][0] < durable:
                self._again[rank].popleft()
        return drops
