"""One thing that was looked at, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """FAIL: a job would not start, or could lose what it has. WARN: it works, but could be better or is at risk."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """What was found, and in one line how to mend it, if it is not well."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert (self.verdict is Verdict.PASS) == (not self.fix), f"{self.name}: a fix belongs to what is not well"
        assert "\n" not in self.fix, f"{self.name}: a fix is one line"
