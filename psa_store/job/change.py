"""A change of a job's numbers from a step on. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from psa_store.errors import UsageError

OPTIMIZER_NUMBERS = ("lr", "weight_decay", "clip_grad_norm")
LOOP_NUMBERS = ("batch_size", "steps")


@dataclass(frozen=True, slots=True)
class Numbers:
    """What may change while a job lives; None: it stays.

    ``lr``, ``weight_decay`` and ``clip_grad_norm`` (0: no limit any more) are the optimizer's. ``batch_size``: samples
    of all ranks in a step. ``steps``: where the job ends.
    """

    lr: float | None = None
    weight_decay: float | None = None
    clip_grad_norm: float | None = None
    batch_size: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in self:
            whole = name in LOOP_NUMBERS
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise UsageError(f"{name}={value!r}: must be a {'whole ' if whole else ''}number")
            if not (math.isfinite(value) and value >= 0.0):
                raise UsageError(f"{name}={value!r}: must be finite and not negative")
        if self.batch_size == 0:
            raise UsageError("batch_size=0: must be at least 1")
        if not any(True for _ in self):
            raise UsageError(f"nothing to change: give one of {', '.join(NUMBERS)}")

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """Those that change, with their names."""
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                yield each.name, value

    def __str__(self) -> str:
        return " ".join(f"{name}={value if name in LOOP_NUMBERS else format(value, 'g')}" for name, value in self)


NUMBERS = tuple(each.name for each in fields(Numbers))


@dataclass(frozen=True, slots=True)
class Change:
    """``numbers`` count from ``step`` on, which is a step of each rank."""

    step: int
    numbers: Numbers

    def applied_to(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer, as ``psa.optim`` writes it, from then on."""
        changed = {name: value for name, value in self.numbers if name in OPTIMIZER_NUMBERS}
        if changed.get("clip_grad_norm") == 0.0:
            return {**optimizer, **changed, "clip_grad_norm": None}
        return {**optimizer, **changed}


def steps_set(changes: Sequence[Change]) -> int | None:
    """Where the job was told to end; None: where the script says."""
    return next((each.numbers.steps for each in reversed(changes) if each.numbers.steps is not None), None)


def batch_size_set(changes: Sequence[Change]) -> int | None:
    """The batch size that the job was told to have in the end; None: that of the script."""
    found = (each.numbers.batch_size for each in reversed(changes))
    return next((size for size in found if size is not None), None)
