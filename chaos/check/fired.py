"""A run proves something only if its faults happened, and if the job made steps after the last one."""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.history import History, Reference

_NAME = "fired"


def check(history: History, _reference: Reference) -> list[Violation]:
    """See the module."""
    fired = {event["id"] for event in history.of("fired")}
    violations = [
        Violation(_NAME, f"fault {event['id']} ({event['kind']}) did not happen", event.t)
        for event in history.of("fault")
        if event["id"] not in fired
    ]
    if not history.of("fault"):
        violations.append(Violation(_NAME, "no fault was planned"))
    quiet = history.of("quiet")
    if not quiet:
        violations.append(Violation(_NAME, "there was no quiet phase"))
    elif not any(event.t > quiet[0].t for event in (*history.of("acked"), *history.of("updated"))):
        violations.append(Violation(_NAME, "no step was completed after the last fault", quiet[0].t))
    return violations
