"""A worker's part in rounds of local steps as a state machine: which rank computes, what is pushed, awaited, adopted.

Theory of operation. One version is one round. Per held rank and round::

    COMPUTING ──its last step──▶ COMPUTED ──▶ PUSHED ──all held ranks──▶ the next round, COMPUTING

Ranks go one after the other, each as soon as it may; :meth:`Rounds.next` says what to do now:

* Push what a COMPUTED rank has moved. With overlap its movement goes on top of the version that the round before has
  made, so that must be here.
* Compute the next step of a COMPUTING rank.
* Once all ranks are PUSHED, Ask the owners for the version that the round makes. Without overlap it must be here before
  the round ends; with overlap the whole next round may pass meanwhile. Then EndRound.
* Finish after the last round. Watch, if no rank is held. Listen otherwise.

``Lost`` changes nothing of that but that the version has to be asked for again: what a rank has computed stays. A new
term (TermBegun) begins anew, at a version.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto


class Stage(Enum):
    COMPUTING = auto()
    COMPUTED = auto()
    PUSHED = auto()


# --- events


@dataclass(frozen=True, slots=True)
class TermBegun:
    """The held ranks have their state at this version, and the global parameters are here."""

    version: int
    ranks: Iterable[int]


@dataclass(frozen=True, slots=True)
class Planned:
    """The servers that own what changes."""

    owners: frozenset[str]


@dataclass(frozen=True, slots=True)
class Stepped:
    """A rank has made a step."""

    rank: int


@dataclass(frozen=True, slots=True)
class Pushed:
    """A rank's movement is on its way."""

    rank: int


@dataclass(frozen=True, slots=True)
class Brought:
    """An owner has brought a version of all its shards."""

    server: str
    version: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """The global parameters are at this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The last round is over, without ranks of this worker."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The connections are gone."""


Event = TermBegun | Planned | Stepped | Pushed | Brought | Pulled | Ended | Lost

# --- instructions


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute a step of a rank. ``first``, ``last``: of those that it makes in this round."""

    step: int
    rank: int
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Push:
    """Push how far the rank has moved in this round."""

    rank: int
    round: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Have done with all versions below; have the owners bring this one."""

    version: int


@dataclass(frozen=True, slots=True)
class EndRound:
    """Go on to the next round. ``adopt``: with the version that this one has made, which is here."""

    round: int
    adopt: bool


@dataclass(frozen=True, slots=True)
class Watch:
    """No rank is held: wait for another plan, or for the end, if there is one."""

    last: int | None


@dataclass(frozen=True, slots=True)
class Finish:
    """All rounds are done: have this version, and have it made durable."""

    version: int


@dataclass(frozen=True, slots=True)
class Listen:
    """Nothing can be done before an answer or a plan comes."""


Instruction = Compute | Push | Ask | EndRound | Watch | Finish | Listen


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

    def handle(self, event: Event) -> None:
        """Take note of what has happened."""
        match event:
            case TermBegun(version, ranks):
                self.round = self.have = version
                self._wanted = None
                self._stages = dict.fromkeys(sorted(ranks), Stage.COMPUTING)
                self._done = dict.fromkeys(self._stages, 0)
            case Planned(owners):
                self._owners = owners
            case Stepped(rank):
                self._done[rank] += 1
                if self._done[rank] == self._steps:
                    self._stages[rank] = Stage.COMPUTED
            case Pushed(rank):
                self._stages[rank] = Stage.PUSHED
            case Brought(server, version):
                if version == self._wanted:
                    self._brought.add(server)
                    if self._brought >= self._owners:
                        self.have = version
            case Pulled(version):
                self.have = version
            case Ended():
                assert self._last is not None
                self.round = self._last
            case Lost():
                self._asked = False
                self._brought.clear()

    def next(self) -> Instruction:
        """What to do now."""
        if self._last is not None and self.round >= self._last:
            return Finish(self._last)
        if not self._stages:
            return Watch(self._last)
        if self._wanted is not None and self._wanted != self.have and not self._asked:
            self._asked = True
            return Ask(self._wanted)
        may_push = not self._overlap or self.have == self.round
        rank = self._first(Stage.COMPUTED)
        if rank is not None and may_push:
            return Push(rank, self.round)
        rank = self._first(Stage.COMPUTING)
        if rank is not None:
            done = self._done[rank]
            return Compute(self.round * self._steps + done, rank, done == 0, done == self._steps - 1)
        if not may_push:
            return Listen()
        return self._end_round()

    def _end_round(self) -> Instruction:
        """All ranks are pushed."""
        if self._wanted != self.round + 1:
            self._wanted, self._asked = self.round + 1, True
            self._brought.clear()
            return Ask(self._wanted)
        if not self._overlap and self.have != self._wanted:
            return Listen()
        self.round += 1
        self._stages = dict.fromkeys(self._stages, Stage.COMPUTING)
        self._done = dict.fromkeys(self._stages, 0)
        return EndRound(self.round - 1, adopt=not self._overlap)

    def _first(self, stage: Stage) -> int | None:
        return next((rank for rank, each in self._stages.items() if each is stage), None)
