"""Schedules that do not simply fall, and the reader of what any schedule is stored as.

Pure, as ``schedule.py``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from psa_store.errors import UsageError
from psa_store.optim.checks import checked, checked_steps
from psa_store.optim.schedule import Fall, Polynomial, Schedule, Shape, check_fall, rising

POINTS_MAX = 10_000
"""Of a table: a job's document has it, and every process reads that."""


@dataclass(frozen=True, slots=True)
class StepDecay(Schedule):
    """``peak``, multiplied by ``gamma`` every so many steps."""

    peak: float
    every: int
    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", checked("peak", self.peak))
        object.__setattr__(self, "gamma", checked("gamma", self.gamma))
        checked_steps("every", self.every, low=1)

    def at(self, step: int) -> float:
        return self.peak * _power(self.gamma, step // self.every)

    def to_dict(self) -> dict[str, Any]:
        return {"shape": Shape.STEP.value, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Milestones(Schedule):
    """``peak``, multiplied by ``gamma`` at each of some steps."""

    peak: float
    milestones: Sequence[int]
    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", checked("peak", self.peak))
        object.__setattr__(self, "gamma", checked("gamma", self.gamma))
        steps = tuple(checked_steps("milestones", each) for each in self.milestones)
        if list(steps) != sorted(steps):
            raise UsageError(f"milestones={list(steps)}: must be in order")
        object.__setattr__(self, "milestones", steps)

    def at(self, step: int) -> float:
        return self.peak * _power(self.gamma, bisect_right(self.milestones, step))

    def to_dict(self) -> dict[str, Any]:
        return {
            "shape": Shape.MILESTONES.value,
            "peak": self.peak,
            "milestones": list(self.milestones),
            "gamma": self.gamma,
        }


@dataclass(frozen=True, slots=True)
class Exponential(Schedule):
    """``peak``, multiplied by ``gamma`` at every step."""

    peak: float
    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", checked("peak", self.peak))
        object.__setattr__(self, "gamma", checked("gamma", self.gamma))

    def at(self, step: int) -> float:
        return self.peak * _power(self.gamma, step)

    def to_dict(self) -> dict[str, Any]:
        return {"shape": Shape.EXPONENTIAL.value, **asdict(self)}


@dataclass(frozen=True, slots=True)
class InverseSqrt(Schedule):
    """It rises over ``warmup`` steps to ``peak``, and falls from there with the square root of the steps since 0."""

    peak: float
    warmup: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", checked("peak", self.peak))
        checked_steps("warmup", self.warmup)

    def at(self, step: int) -> float:
        if step < self.warmup:
            return rising(step, self.peak, self.warmup)
        return self.peak * math.sqrt((self.warmup + 1) / (step + 1))

    def to_dict(self) -> dict[str, Any]:
        return {"shape": Shape.INVERSE_SQRT.value, **asdict(self)}


@dataclass(frozen=True, slots=True)
class OneCycle(Schedule):
    """From ``start`` to ``peak`` and on to ``final``, each along half a cosine, as torch's ``OneCycleLR`` with two
    phases; the first takes ``rise`` of ``total`` steps."""

    peak: float
    total: int
    rise: float
    start: float
    final: float

    def __post_init__(self) -> None:
        for name in ("peak", "start", "final"):
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        checked_steps("total", self.total, low=2)
        object.__setattr__(self, "rise", checked("rise", self.rise, below=1.0))

    def at(self, step: int) -> float:
        top, end = self.rise * self.total - 1, self.total - 1
        if step < top:
            return _cosine(self.start, self.peak, step / top)
        top = max(top, 0.0)
        return _cosine(self.peak, self.final, (step - top) / (end - top)) if step < end else self.final

    def to_dict(self) -> dict[str, Any]:
        return {"shape": Shape.ONE_CYCLE.value, **asdict(self)}


@dataclass(frozen=True, slots=True)
class WarmupStableDecay(Schedule):
    """It rises over ``warmup`` steps to ``peak``, stays, falls on a straight line over the last ``decay`` of ``total``
    steps to ``final``, and stays there."""

    peak: float
    warmup: int
    decay: int
    total: int
    final: float

    def __post_init__(self) -> None:
        check_fall(self, self.peak, self.warmup, self.total, self.final)
        checked_steps("decay", self.decay, low=1)
        if self.warmup + self.decay > self.total:
            raise UsageError(f"warmup={self.warmup}, decay={self.decay}: are more steps than total={self.total}")

    def at(self, step: int) -> float:
        if step < self.warmup:
            return rising(step, self.peak, self.warmup)
        remaining = min(1.0, max(0, self.total - step) / self.decay)
        return self.final + remaining * (self.peak - self.final)

    def to_dict(self) -> dict[str, Any]:
        return {"shape": Shape.WARMUP_STABLE_DECAY.value, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Table(Schedule):
    """Rates of some steps. Before the first point and after the last the rate is theirs.

    ``between``: "linear" reads a straight line between two points, "hold" the rate of the earlier one.
    """

    points: Sequence[tuple[int, float]]
    between: str

    def __post_init__(self) -> None:
        if self.between not in ("linear", "hold"):
            raise UsageError(f"between={self.between!r}: must be 'linear' or 'hold'")
        if not 1 <= len(self.points) <= POINTS_MAX:
            raise UsageError(f"points: {len(self.points)} of them; give 1 to {POINTS_MAX}")
        points = tuple((checked_steps("step", step), checked("rate", rate)) for step, rate in self.points)
        if any(later <= earlier for (earlier, _), (later, _) in pairwise(points)):
            raise UsageError("points: their steps must grow")
        object.__setattr__(self, "points", points)

    def at(self, step: int) -> float:
        after = bisect_right(self.points, step, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        start, rate = self.points[after - 1]
        if after == len(self.points) or self.between == "hold":
            return rate
        end, next_rate = self.points[after]
        return rate + (next_rate - rate) * ((step - start) / (end - start))

    def to_dict(self) -> dict[str, Any]:
        points = [list(point) for point in self.points]
        return {"shape": Shape.TABLE.value, "points": points, "between": self.between}


@dataclass(frozen=True, slots=True)
class Pieces(Schedule):
    """A rate of each step, as ``pieces.py`` makes it of samples.

    ``pieces``: where each starts, and the coefficients of its polynomial of the steps since, lowest first.
    ``total``: steps that were sampled. Later ones have the last rate; if it ``repeats``, those from the start again.
    """

    pieces: Sequence[tuple[int, Sequence[float]]]
    total: int
    repeats: bool = False

    def __post_init__(self) -> None:
        checked_steps("total", self.total, low=1)
        if not isinstance(self.repeats, bool):
            raise UsageError(f"repeats={self.repeats!r}: must be True or False")
        pieces = tuple(
            (checked_steps("start", start), tuple(checked("coefficient", each, low=-math.inf) for each in numbers))
            for start, numbers in self.pieces
        )
        starts = [start for start, _ in pieces]
        if not all(numbers for _, numbers in pieces):
            raise UsageError("pieces: one has no coefficient")
        if starts[:1] != [0] or starts != sorted(set(starts)) or starts[-1] >= self.total:
            raise UsageError(f"pieces: they start at {starts[:5]}, …; the first must start at 0, each next one later")
        object.__setattr__(self, "pieces", pieces)

    def at(self, step: int) -> float:
        step = step % self.total if self.repeats else min(step, self.total - 1)
        start, numbers = self.pieces[bisect_right(self.pieces, step, key=lambda piece: piece[0]) - 1]
        rate = numbers[-1]
        for number in reversed(numbers[:-1]):
            rate = rate * (step - start) + number
        return max(0.0, rate)

    def to_dict(self) -> dict[str, Any]:
        pieces = [[start, list(numbers)] for start, numbers in self.pieces]
        return {"shape": Shape.PIECES.value, "pieces": pieces, "total": self.total, "repeats": self.repeats}


def step_decay(peak: float, every: int, gamma: float = 0.1) -> Schedule:
    """Multiply the rate by ``gamma`` every so many steps."""
    return StepDecay(peak, every, gamma)


def milestones(peak: float, milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    """Multiply the rate by ``gamma`` at each of these steps."""
    return Milestones(peak, milestones, gamma)


def exponential(peak: float, gamma: float) -> Schedule:
    """Multiply the rate by ``gamma`` at every step."""
    return Exponential(peak, gamma)


def inverse_sqrt(peak: float, warmup: int = 100) -> Schedule:
    """Rise linearly over ``warmup`` steps, then fall as one over the square root of the step."""
    return InverseSqrt(peak, warmup)


def one_cycle(
    peak: float, total: int, rise: float = 0.3, start: float | None = None, final: float | None = None
) -> Schedule:
    """Rise from ``start`` to ``peak`` in the first ``rise`` of ``total`` steps, fall to ``final`` in the rest, stay
    there; both along half a cosine. Defaults are torch's: a 25th of ``peak``, and a 10,000th of that."""
    start = checked("peak", peak) / 25.0 if start is None else start
    return OneCycle(peak, total, rise, start, start / 1e4 if final is None else final)


def warmup_stable_decay(
    peak: float, warmup: int = 100, decay: int = 400, total: int = 2000, final: float = 0.0
) -> Schedule:
    """Rise linearly over ``warmup`` steps, stay, fall on a straight line over the last ``decay`` steps to ``final`` at
    step ``total``, stay there."""
    return WarmupStableDecay(peak, warmup, decay, total, final)


def table(points: Mapping[int, float] | Sequence[tuple[int, float]], between: str = "linear") -> Schedule:
    """Read the rate from points of step and rate: ``{0: 1e-3, 1000: 1e-3, 2000: 1e-4}``.

    ``between``: "linear" reads a straight line between two points, "hold" the rate of the earlier one. Before the first
    point and after the last the rate is theirs.
    """
    return Table(tuple(points.items() if isinstance(points, Mapping) else points), between)


_BY_SHAPE: Mapping[str, Callable[..., Schedule]] = {
    **{shape: partial(Fall, shape) for shape in (Shape.CONSTANT, Shape.COSINE, Shape.LINEAR)},
    Shape.POLYNOMIAL: Polynomial,
    Shape.STEP: StepDecay,
    Shape.MILESTONES: Milestones,
    Shape.EXPONENTIAL: Exponential,
    Shape.INVERSE_SQRT: InverseSqrt,
    Shape.ONE_CYCLE: OneCycle,
    Shape.WARMUP_STABLE_DECAY: WarmupStableDecay,
    Shape.TABLE: Table,
    Shape.PIECES: Pieces,
}


def schedule_from_dict(document: Mapping[str, Any]) -> Schedule:
    """Rebuild a schedule from :meth:`Schedule.to_dict`; raises KeyError, TypeError, ValueError or UsageError."""
    arguments = dict(document)
    return _BY_SHAPE[arguments.pop("shape")](**arguments)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * progress) + 1.0)


def _power(gamma: float, times: int) -> float:
    try:
        return math.pow(gamma, times)
    except OverflowError:
        return math.inf
