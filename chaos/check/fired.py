"""A run proves something only if its faults happened, and if the job went on in peace after them."""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.journal import Journal, Truth

_NAME = "fired"


def check(journal: Journal, _known: Truth) -> list[Violation]:
    """See the module."""
    fired = {event["id"] for event in journal.of("fired")}
    violations = [
        Violation(_NAME, f"fault {event['id']} ({event['kind']}) did not happen", event.t)
        for event in journal.of("fault")
        if event["id"] not in fired
    ]
    if not journal.of("fault"):
        violations.append(Violation(_NAME, "no fault was planned"))
    quiet = journal.of("quiet")
    if not quiet:
        violations.append(Violation(_NAME, "there was no quiet phase"))
    elif not any(event.t > quiet[0].t for event in journal.of("acked")):
        violations.append(Violation(_NAME, "no step was completed after the last fault", quiet[0].t))
    return violations
