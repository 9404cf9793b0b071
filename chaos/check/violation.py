"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept. ``t``: when it showed, by the clock of the journals."""

    check: str
    message: str
    t: float | None = None
