"""Learning-rate schedules as data: a shape and a few numbers, from which every server computes the same rate.

Pure float64 arithmetic; the rate of a step depends on nothing but the step. Here: what all have in common, and those
that rise at first and then fall to a final rate. The others are in ``schedules.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from psa_store.optim.checks import checked, checked_steps


class Shape(StrEnum):
    """What a schedule is; the value is what is stored with the job."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"
    POLYNOMIAL = "polynomial"
    STEP = "step"
    MILESTONES = "milestones"
    EXPONENTIAL = "exponential"
    INVERSE_SQRT = "inverse-sqrt"
    ONE_CYCLE = "one-cycle"
    WARMUP_STABLE_DECAY = "warmup-stable-decay"
    TABLE = "table"
    PIECES = "pieces"


class Schedule(ABC):
    """A learning rate that depends on the step. Build one with the functions of ``psa.optim``."""

    __slots__ = ()

    @abstractmethod
    def at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON object: the shape, and the arguments of the class that has it."""


@dataclass(frozen=True, slots=True)
class Fall(Schedule):
    """It rises linearly over ``warmup`` steps, is ``peak`` at step ``warmup``, falls to ``final`` at step ``total`` in
    the given shape, and stays there.
    """

    shape: Shape
    peak: float
    warmup: int
    total: int
    final: float

    def __post_init__(self) -> None:
        check_fall(self, self.peak, self.warmup, self.total, self.final)

    def at(self, step: int) -> float:
        if self.shape is Shape.CONSTANT:
            return self.peak
        if step < self.warmup:
            return rising(step, self.peak, self.warmup)
        if step >= self.total:
            return self.final
        progress = (step - self.warmup) / (self.total - self.warmup)
        remaining = 1.0 - progress if self.shape is Shape.LINEAR else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.final + remaining * (self.peak - self.final)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": self.shape.value}


@dataclass(frozen=True, slots=True)
class Polynomial(Schedule):
    """As :class:`Fall`; of the way down from ``peak``, ``(1 - progress) ** power`` remains."""

    peak: float
    warmup: int
    total: int
    final: float
    power: float

    def __post_init__(self) -> None:
        check_fall(self, self.peak, self.warmup, self.total, self.final)
        object.__setattr__(self, "power", checked("power", self.power))

    def at(self, step: int) -> float:
        if step < self.warmup:
            return rising(step, self.peak, self.warmup)
        if step >= self.total:
            return self.final
        remaining = 1.0 - (step - self.warmup) / (self.total - self.warmup)
        return self.final + math.pow(remaining, self.power) * (self.peak - self.final)

    def to_dict(self) -> dict[str, Any]:
        return {"shape": Shape.POLYNOMIAL.value, **asdict(self)}


def rising(step: int, peak: float, warmup: int) -> float:
    """The rate of a step before ``warmup``."""
    return peak * (step + 1) / (warmup + 1)


def check_fall(schedule: Schedule, peak: float, warmup: int, total: int, final: float) -> None:
    """Check what a schedule from ``peak`` to ``final`` is made of, and make its rates floats."""
    object.__setattr__(schedule, "peak", checked("peak", peak))
    object.__setattr__(schedule, "final", checked("final", final))
    checked_steps("warmup", warmup)
    checked_steps("total", total, low=warmup + 1)


def constant(lr: float) -> Schedule:
    """The same rate at every step; the same as giving the number itself as ``lr``."""
    return Fall(Shape.CONSTANT, lr, warmup=0, total=1, final=lr)


def warmup_cosine(peak: float, warmup: int = 100, total: int = 2000, final: float = 1e-4) -> Schedule:
    """Rise linearly over ``warmup`` steps, fall along half a cosine to ``final`` at step ``total``, stay
    there."""
    return Fall(Shape.COSINE, peak, warmup, total, final)


def linear(peak: float, warmup: int = 0, total: int = 2000, final: float = 0.0) -> Schedule:
    """Rise linearly over ``warmup`` steps, fall on a straight line to ``final`` at step ``total``, stay
    there."""
    return Fall(Shape.LINEAR, peak, warmup, total, final)


def polynomial(peak: float, power: float = 1.0, warmup: int = 0, total: int = 2000, final: float = 0.0) -> Schedule:
    """Rise linearly over ``warmup`` steps, fall to ``final`` at step ``total`` with the given power of what remains of
    the way, stay there."""
    return Polynomial(peak, warmup, total, final, power)
