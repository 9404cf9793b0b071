"""Learning-rate schedules as data: a shape and four numbers, from which every server computes the same rate.

Pure float64 arithmetic; the rate of a step depends on nothing but the step.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from psa_store.errors import UsageError
from psa_store.optim.checks import checked, checked_steps


class Shape(StrEnum):
    """How the rate gets from ``peak`` to ``final``; the value is what is stored with the job."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning rate that depends on the step.

    It rises linearly over ``warmup`` steps, is ``peak`` at step ``warmup``, falls to ``final`` at step
    ``total`` in the given shape, and stays there. Build one with :func:`constant`, :func:`warmup_cosine` or
    :func:`linear`.
    """

    shape: Shape
    peak: float
    warmup: int
    total: int
    final: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _shape(self.shape))
        object.__setattr__(self, "peak", checked("peak", self.peak))
        object.__setattr__(self, "final", checked("final", self.final))
        checked_steps("warmup", self.warmup)
        checked_steps("total", self.total, low=self.warmup + 1)

    def at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        if self.shape is Shape.CONSTANT:
            return self.peak
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if step >= self.total:
            return self.final
        progress = (step - self.warmup) / (self.total - self.warmup)
        remaining = 1.0 - progress if self.shape is Shape.LINEAR else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.final + remaining * (self.peak - self.final)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object whose members are the arguments of :class:`Schedule`."""
        return {**asdict(self), "shape": self.shape.value}


def constant(lr: float) -> Schedule:
    """The same rate at every step; the same as giving the number itself as ``lr``."""
    return Schedule(Shape.CONSTANT, lr, warmup=0, total=1, final=lr)


def warmup_cosine(peak: float, warmup: int = 100, total: int = 2000, final: float = 1e-4) -> Schedule:
    """Rise linearly over ``warmup`` steps, fall along half a cosine to ``final`` at step ``total``, stay
    there."""
    return Schedule(Shape.COSINE, peak, warmup, total, final)


def linear(peak: float, warmup: int = 0, total: int = 2000, final: float = 0.0) -> Schedule:
    """Rise linearly over ``warmup`` steps, fall on a straight line to ``final`` at step ``total``, stay
    there."""
    return Schedule(Shape.LINEAR, peak, warmup, total, final)


def _shape(value: object) -> Shape:
    try:
        return Shape(value)  # type: ignore[arg-type]  # any object may be asked for; unknown ones raise
    except ValueError:
        raise UsageError(f"shape={value!r}: must be one of {', '.join(Shape)}") from None
