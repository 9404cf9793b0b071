"""A run proves something only if those who were to look did look: the reader outside, and in long runs the sampler."""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.journal import Journal, Truth

_NAME = "observed"
LONG_S = 300.0
"""From this length on, what could leak is looked at."""


def check(journal: Journal, _known: Truth) -> list[Violation]:
    """See the module. A digest that does not match was seen as well, and is allowed only where data were damaged."""
    if not journal.of("scenario"):
        return []
    violations = []
    if not journal.of("head"):
        violations.append(Violation(_NAME, "the reader never saw a head"))
    quiet = journal.of("quiet")
    if quiet and not any(event.t > quiet[0].t for event in journal.of("read")):
        violations.append(Violation(_NAME, "the reader read no version after the last fault"))
    codes = [event["exit_code"] for event in journal.of("reader")]
    if codes != [0]:
        violations.append(Violation(_NAME, f"the reader ended with {codes or 'nothing'}"))
    if not journal.scenario["loses_redis"]:
        violations += [
            Violation(_NAME, f"{event.role} {event.name}: {event['error']}", event.t)
            for event in journal.of("failed")
            if "digest" in event["error"]
        ]
    samples = journal.of("sample")
    length_s = journal.events[-1].t - journal.events[0].t
    if length_s > LONG_S and (not samples or samples[-1].t - samples[0].t < length_s / 2):
        violations.append(Violation(_NAME, "memory, descriptors and keys were not looked at"))
    return violations
