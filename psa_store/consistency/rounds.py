"""A worker's part in rounds of local steps as a state machine: which rank computes, what is pushed, awaited, adopted.

Theory of operation. One version is one round. Per held rank and round::

    COMPUTING ──its last step──▶ COMPUTED ──▶ PUSHED ──all held ranks──▶ the next round, COMPUTING

Ranks go one after the other, each as soon as it may; :meth:`Rounds.next` says what to do now:

* Push what a COMPUTED rank has moved. With overlap its movement goes on top of the version that the round before has
  made, so that must be here.
* Compute the next step of a COMPUTING rank.
* Once all ranks are PUSHED, Await the version that the round makes. Without overlap it must be here before
  the round ends; with overlap the whole next round may pass meanwhile. Then EndRound.
* Finish after the last round. Watch, if no rank is held. Listen otherwise.

``lost`` changes nothing of that but that the version has to be asked for again: what a rank has computed stays. A new
term (``term_begun``) begins anew, at a version.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from psa_store.consistency.worker_instructions import LISTEN, Await, Compute, Finish, Listen


class Stage(Enum):
    COMPUTING = auto()
    COMPUTED = auto()
    PUSHED = auto()


@dataclass(frozen=True, slots=True)
class Push:
    """Push how far the rank has moved in this round."""

    rank: int
    round: int


@dataclass(frozen=True, slots=True)
class EndRound:
    """Go on to the next round. ``adopt``: with the version that this one has made, which is here."""

    round: int
    adopt: bool


@dataclass(frozen=True, slots=True)
class Watch:
    """No rank is held: wait for another plan, or for the end, if there is one."""

    last: int | None


Instruction = Compute | Push | Await | EndRound | Watch | Finish | Listen


class Rounds:
    """One worker's view of the present round. Not thread-safe.

    Args:
        last: the version at which the job ends; None: never.
        steps: that a rank makes in a round.
        overlap: whether ranks go on while a round is exchanged.
    """

    def __init__(self, last: int | None, steps: int, *, overlap: bool) -> None:
        self._last = last
        self._steps = steps
        self._overlap = overlap
        self.round = 0
        self.have: int | None = None
        """The version that the global parameters are."""
        self._wanted: int | None = None
        """The version that owners are to bring."""
        self._asked = False
        """Whether they were asked, on these connections."""
        self._owners: frozenset[str] = frozenset()
        self._brought: set[str] = set()
        self._stages: dict[int, Stage] = {}
        self._done: dict[int, int] = {}
        """By rank, the steps that it has made in this round."""

    @property
    def awaits(self) -> tuple[int, frozenset[str]] | None:
        """The version that is awaited, and the owners that have not brought it."""
        if self._wanted is None or self._wanted == self.have:
            return None
        return self._wanted, self._owners - self._brought

    # --- what has happened

    def ends_at(self, last: int | None) -> None:
        """The job ends at another version than was known."""
        self._last = last

    def term_begun(self, version: int, ranks: Iterable[int]) -> None:
        """The held ranks have their state at this version, and the global parameters are here."""
        self.round = self.have = version
        self._wanted = None
        self._begin_round(sorted(ranks))

    def planned(self, owners: frozenset[str]) -> None:
        """The servers that own what changes."""
        self._owners = owners

    def stepped(self, rank: int) -> bool:
        """A rank has made a step; returns whether it was its last in this round."""
        self._done[rank] += 1
        if self._done[rank] < self._steps:
            return False
        self._stages[rank] = Stage.COMPUTED
        return True

    def pushed(self, rank: int) -> None:
        """A rank's movement is on its way."""
        self._stages[rank] = Stage.PUSHED

    def brought(self, server: str, version: int) -> bool:
        """An owner has brought a version of all its shards; returns whether with that the awaited one is here."""
        if version != self._wanted or version == self.have:
            return False
        self._brought.add(server)
        if self._brought >= self._owners:
            self.have = version
        return version == self.have

    def pulled(self, version: int) -> None:
        """The global parameters are at this version."""
        self.have = version

    def ended(self) -> None:
        """The last round is over, without ranks of this worker."""
        assert self._last is not None
        self.round = self._last

    def lost(self) -> None:
        """The connections are gone."""
        self._asked = False
        self._brought.clear()

    # --- what is to be done

    def next(self) -> Instruction:
        """What to do now."""
        if self._last is not None and self.round >= self._last:
            return Finish(self._last)
        if not self._stages:
            return Watch(self._last)
        if self._wanted is not None and self._wanted != self.have and not self._asked:
            self._asked = True
            return Await(self._wanted, self._owners)
        may_push = not self._overlap or self.have == self.round
        rank = self._first(Stage.COMPUTED)
        if rank is not None and may_push:
            return Push(rank, self.round)
        rank = self._first(Stage.COMPUTING)
        if rank is not None:
            return Compute(self.round * self._steps + self._done[rank], rank)
        if not may_push:
            return LISTEN
        return self._end_round()

    def _end_round(self) -> Instruction:
        """All ranks are pushed."""
        if self._wanted != self.round + 1:
            self._wanted, self._asked = self.round + 1, True
            self._brought.clear()
            return Await(self._wanted, self._owners)
        if not self._overlap and self.have != self._wanted:
            return LISTEN
        self.round += 1
        self._begin_round(self._stages)
        return EndRound(self.round - 1, adopt=not self._overlap)

    def _begin_round(self, ranks: Iterable[int]) -> None:
        self._stages = dict.fromkeys(ranks, Stage.COMPUTING)
        self._done = dict.fromkeys(self._stages, 0)

    def _first(self, stage: Stage) -> int | None:
        return next((rank for rank, each in self._stages.items() if each is stage), None)
