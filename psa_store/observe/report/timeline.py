"""How a job moved: at what rate when nothing disturbed it, when it was at rest or down, which versions stayed. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from statistics import median

from psa_store.observe.curve import Point
from psa_store.observe.events import Event, EventKind

_GAP_S_MIN = 5.0
_GAP_INTERVALS = 4.0
"""Where no point comes for longer than both, the job may not have moved."""
_STANDS_BELOW = 0.5
"""And has not, if it made fewer versions in that time than this share of the normal."""

GONE = (EventKind.SERVER_GONE, EventKind.WORKER_GONE)
_JOINED = (EventKind.SERVER_JOINED, EventKind.WORKER_JOINED)
_PLACES = (EventKind.TERM, EventKind.RECOVERED, EventKind.HAND_OVER, EventKind.ROLLBACK, EventKind.FINISHED)
"""Events that say at which version the job was."""


class State(StrEnum):
    """RUNNING: it moved. DOWN: it should have moved and did not. REST: its servers had left, and it was not run."""

    RUNNING = "running"
    DOWN = "down"
    REST = "rest"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time; seconds since 1970."""

    begin_s: float
    end_s: float
    state: State

    @property
    def length_s(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True)
class Moment:
    """When the job was at a version, as a point or an event says."""

    time_s: float
    term: int
    version: int
    workers: int
    kind: EventKind | None
    """None: a point."""


def forward(points: Iterable[Point]) -> tuple[tuple[Point, ...], float]:
    """The same points with times that never go back, and by how many seconds they did, all in all.

    Controllers of several hosts write points, and their clocks differ.
    """
    ordered: list[Point] = []
    back_s, newest_s, last_s = 0.0, -math.inf, -math.inf
    for each in points:
        back_s += max(0.0, last_s - each.time)
        last_s, newest_s = each.time, max(newest_s, each.time)
        ordered.append(replace(each, time=newest_s))
    return tuple(ordered), back_s


class Rates:
    """Versions per second where nothing disturbed the job, by the number of workers: the median over time."""

    def __init__(self, points: Sequence[Point], events: Iterable[Event], gap_s: float) -> None:
        disturbed = [each.time for each in events if each.kind in (*GONE, *_PLACES)]
        found: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for a, b in pairwise(points):
            passed_s = b.time - a.time
            same = (a.term, a.workers) == (b.term, b.workers)
            calm = same and not any(a.time < time_s <= b.time for time_s in disturbed)
            if calm and 0.0 < passed_s <= gap_s and b.version > a.version:
                found[a.workers].append(((b.version - a.version) / passed_s, passed_s))
        self._by_workers = {workers: _weighted_median(rates) for workers, rates in found.items()}
        every = [each for rates in found.values() for each in rates]
        self.usual = _weighted_median(every) if every else None
        """With any number; None if the job was never undisturbed."""

    def of(self, workers: int) -> float | None:
        """With so many workers, where that is known, else the usual."""
        return self._by_workers.get(workers, self.usual)


def interval_s(points: Sequence[Point]) -> float:
    """The usual time between two points: how exactly anything is known."""
    return median(b.time - a.time for a, b in pairwise(points)) if len(points) > 1 else 0.0


def gap_after_s(points: Sequence[Point]) -> float:
    """How long no point may come while the job moves."""
    return max(_GAP_S_MIN, _GAP_INTERVALS * interval_s(points))


def moments(points: Iterable[Point], events: Iterable[Event]) -> tuple[Moment, ...]:
    """All that says at which version the job was, in the order of time."""
    placed = [(each, each.version) for each in events if each.kind in _PLACES]
    known = [Moment(each.time, each.term or 0, at, 0, each.kind) for each, at in placed if at is not None]
    known += [Moment(each.time, each.term, each.version, each.workers, None) for each in points]
    ordered: list[Moment] = []
    term = workers = 0
    ended = False
    for moment in sorted(known, key=lambda each: each.time_s):
        if ended and moment.kind is None:
            continue  # made of heartbeats from before the end
        ended = moment.kind is EventKind.FINISHED
        term = max(term, moment.term)
        workers = workers if moment.kind else moment.workers
        ordered.append(replace(moment, term=moment.term or term, workers=workers))
    return tuple(ordered)


def kept_versions(timeline: Sequence[Moment]) -> list[int]:
    """Of the versions made between each moment and the next, how many stayed: none that was gone back behind later."""
    reached = [each.version for each in timeline]
    for index in range(len(reached) - 2, -1, -1):
        reached[index] = min(reached[index], reached[index + 1])
    return [b - a for a, b in pairwise(reached)]


def segments(timeline: Sequence[Moment], events: Sequence[Event], rates: Rates, gap_s: float) -> tuple[Segment, ...]:
    """The time from the first moment to the last, without holes."""
    found: list[Segment] = []
    for index, (a, b) in enumerate(pairwise(timeline), 1):
        upcoming = next((each for each in timeline[index:] if each.kind is not EventKind.ROLLBACK), None)
        if upcoming is None or upcoming.kind is EventKind.TERM:
            # The servers had left before, for a term that follows on another is a recovery or a hand-over. A job that
            # is at rest can be rolled back, and goes on from there later.
            ends = [each.time for each in events if each.kind not in _JOINED and each.time < b.time_s]
            rest_s = max([a.time_s, *ends])
            _extend(found, Segment(a.time_s, rest_s, State.RUNNING))
            _extend(found, Segment(rest_s, b.time_s, State.REST))
        else:
            rate = rates.of(b.workers)
            made_s = max(0, b.version - a.version) / rate if rate else 0.0
            passed_s = b.time_s - a.time_s
            down = passed_s > gap_s and made_s < _STANDS_BELOW * passed_s
            _extend(found, Segment(a.time_s, b.time_s, State.DOWN if down else State.RUNNING))
    return tuple(found)


def _extend(found: list[Segment], segment: Segment) -> None:
    if segment.length_s <= 0.0:
        return
    if found and found[-1].state is segment.state:
        segment = Segment(found.pop().begin_s, segment.end_s, segment.state)
    found.append(segment)


def _weighted_median(rates: Iterable[tuple[float, float]]) -> float:
    """Of (rate, weight): half of the weight lies at or below."""
    ordered = sorted(rates)
    left = sum(weight for _, weight in ordered) / 2
    for rate, weight in ordered:
        left -= weight
        if left <= 0.0:
            return rate
    return ordered[-1][0]
