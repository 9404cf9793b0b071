"""A change of a job's numbers from a step on. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from psa_store.errors import UsageError


@dataclass(frozen=True, slots=True)
class Numbers:
    """What of an optimizer may change while a job lives; None: it stays. ``clip_grad_norm`` 0: no limit any more."""

    lr: float | None = None
    weight_decay: float | None = None
    clip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name, value in self:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{name}={value!r}: must be a number")
            if not (math.isfinite(value) and value >= 0.0):
                raise UsageError(f"{name}={value!r}: must be finite and not negative")
        if not any(True for _ in self):
            raise UsageError(f"nothing to change: give one of {', '.join(NUMBERS)}")

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """Those that change, with their names."""
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                yield each.name, value

    def __str__(self) -> str:
        return " ".join(f"{name}={value:g}" for name, value in self)


NUMBERS = tuple(each.name for each in fields(Numbers))


@dataclass(frozen=True, slots=True)
class Change:
    """``numbers`` count from ``step`` on, which is a step of each rank."""

    step: int
    numbers: Numbers

    def applied_to(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer, as ``psa.optim`` writes it, from then on."""
        changed = dict(self.numbers)
        if changed.get("clip_grad_norm") == 0.0:
            return {**optimizer, **changed, "clip_grad_norm": None}
        return {**optimizer, **changed}
