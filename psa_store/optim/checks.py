"""Checks of the numbers that users give to optimizers and schedules. Used by this package only."""

from __future__ import annotations

import math
from numbers import Real

from psa_store.errors import UsageError


def checked(name: str, value: object, low: float = 0.0, below: float = math.inf) -> float:
    """Return ``value`` as a float; raise UsageError naming the argument unless it is in [low, below)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name}={value!r}: must be a number, not {type(value).__name__}")
    number = float(value)
    if not (math.isfinite(number) and low <= number < below):
        upper = "" if below == math.inf else f" and less than {below:g}"
        lower = "finite" if low == -math.inf else f"finite, at least {low:g}"
        raise UsageError(f"{name}={value!r}: must be {lower}{upper}")
    return number


def checked_steps(name: str, value: object, low: int = 0) -> int:
    """Return ``value`` if it is an int of at least ``low``; raise UsageError naming the argument if not."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{name}={value!r}: must be a whole number of steps, at least {low}")
    return value
