"""What can be asked of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from psa_store.errors import UsageError

WORKERS_MAX = 32
STEPS_MAX = 20
"""Timed steps in a block. Gloo's gradients grow by the number of workers in each: 32 ** 21 is still a float32."""


class Rule(StrEnum):
    """The optimizer."""

    SGD = "sgd"
    ADAMW = "adamw"


class Carrier(StrEnum):
    """How psa's workers reach its server."""

    SHARED = "shared"
    TCP = "tcp"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Bench:
    """What is to be measured: ``rounds`` blocks of ``steps`` timed steps of every contender, for each number of
    workers. Raises UsageError if that cannot be done."""

    elements: int
    """float32 parameters."""
    workers: tuple[int, ...]
    rule: Rule
    clip: float | None
    """Largest norm of the mean gradient; None: not clipped."""
    carrier: Carrier
    peers: bool
    limits: bool
    rounds: int
    steps: int

    def __post_init__(self) -> None:
        if not self.workers or len(set(self.workers)) < len(self.workers):
            raise UsageError("--workers: give each number once, for example 2,4")
        if not all(1 <= each <= WORKERS_MAX for each in self.workers):
            raise UsageError(f"--workers: use numbers from 1 to {WORKERS_MAX}")
        if self.elements < 1:
            raise UsageError("--megabytes: too small for one parameter")
        if self.clip is not None and self.clip <= 0:
            raise UsageError(f"--clip {self.clip:g}: must be greater than 0")
