"""What `psa doctor` found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Verdict(StrEnum):
    """FAIL: a job would not start, or could lose what it has. WARN: it works, but could be better or is at risk."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was examined."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""
    """How to mend it, in one line; empty if it is well."""

    def __post_init__(self) -> None:
        assert (self.verdict is Verdict.PASS) == (not self.fix), f"{self.name}: a fix belongs to what is not well"
        assert "\n" not in self.fix, f"{self.name}: a fix is one line"


@dataclass(frozen=True, slots=True)
class Examination:
    """All checks, in the order in which they are read: the JSON of `psa doctor`."""

    FORMAT: ClassVar[int] = 1

    fit: bool
    """Whether no check failed."""
    checks: tuple[Check, ...]
