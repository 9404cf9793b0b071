"""A run proves something only if it was observed: by the reader outside, and in long runs by the sampler."""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.history import History, Reference

_NAME = "observed"
LONG_S = 300.0
"""The length from which on leaks are looked for."""


def check(history: History, _reference: Reference) -> list[Violation]:
    """See the module. A digest that does not match was seen as well, and is allowed only where data were damaged."""
    if not history.of("scenario"):
        return []
    violations = []
    if not history.of("head"):
        violations.append(Violation(_NAME, "the reader never saw a head"))
    quiet = history.of("quiet")
    if quiet and not any(event.t > quiet[0].t for event in history.of("read")):
        violations.append(Violation(_NAME, "the reader read no version after the last fault"))
    codes = [event["exit_code"] for event in history.of("reader")]
    if codes != [0]:
        violations.append(Violation(_NAME, f"the reader ended with {codes or 'nothing'}"))
    if not history.scenario["loses_redis"]:
        violations += [
            Violation(_NAME, f"{event.role} {event.name}: {event['error']}", event.t)
            for event in history.of("failed")
            if "digest" in event["error"]
        ]
    samples = history.of("sample")
    length_s = history.events[-1].t - history.events[0].t
    if length_s > LONG_S and (not samples or samples[-1].t - samples[0].t < length_s / 2):
        violations.append(Violation(_NAME, "memory, descriptors and keys were not sampled"))
    return violations
