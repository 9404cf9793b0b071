"""Nothing leaks: over a long run, what grows is compared between its second fifth and its last."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from chaos.check.observed import LONG_S
from chaos.check.violation import Violation
from chaos.history import Event, History, Reference

_NAME = "trends"
_YOUNG_S = 20.0
"""A process that has just started is still growing to its size."""
_ALLOWED = {
    "rss_mb": (0.10, 30.0),
    "fds": (0.10, 4.0),
    "threads": (0.10, 4.0),
    "keys": (0.10, 20.0),
    "znodes": (0.10, 20.0),
}
"""By measure, by which share and by how much at least it may grow."""


def check(history: History, _reference: Reference) -> list[Violation]:
    """See the module."""
    samples = history.of("sample")
    if not samples or samples[-1].t - samples[0].t < LONG_S:
        return []
    begun, length = samples[0].t, samples[-1].t - samples[0].t
    born: dict[int, float] = {}
    early: dict[tuple[str, str], list[float]] = defaultdict(list)
    late: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample in samples:
        pid = sample.fields.get("pid", 0)
        if sample.t - born.setdefault(pid, sample.t) < _YOUNG_S:
            continue
        share = (sample.t - begun) / length
        if 0.2 <= share < 0.4 or share >= 0.8:
            _note(sample, early if share < 0.4 else late)
    return [
        Violation(_NAME, f"{measure} of {role} grew from {median(early[role, measure]):g} to {median(values):g}")
        for (role, measure), values in late.items()
        if early[role, measure] and _grew(measure, median(early[role, measure]), median(values))
    ]


def _note(sample: Event, into: dict[tuple[str, str], list[float]]) -> None:
    for measure in _ALLOWED:
        if measure in sample.fields:
            into[sample["role"], measure].append(float(sample[measure]))


def _grew(measure: str, before: float, after: float) -> bool:
    share, least = _ALLOWED[measure]
    return after - before > max(share * before, least)
