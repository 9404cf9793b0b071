"""What the journals of a drill must show. Pure."""

from __future__ import annotations

from collections import defaultdict

from chaos.check.violation import Violation
from chaos.history import History

_CHECK = "barrier"
CALM_BARRIERS = 2
"""So many must succeed after the last fault."""


def check_drill(history: History) -> list[Violation]:
    """Find early passes, differing outcomes, faults that did not happen, and too few successes after the last one."""
    found: list[Violation] = []
    arrived: dict[str, dict[str, float]] = defaultdict(dict)
    for event in history.of("arriving"):
        arrived[event["barrier"]][event.name] = event.t
    states: dict[str, set[str]] = defaultdict(set)
    calm_s = max((event.t for event in history.of("calm")), default=float("inf"))
    passed_later = set()
    for event in history.of("outcome"):
        barrier, state = event["barrier"], event["state"]
        states[barrier].add(state)
        if state != "done":
            continue
        early = [each for each in event["members"] if arrived[barrier].get(each, float("inf")) > event.t]
        if early:
            found.append(Violation(_CHECK, f"{event.name} passed barrier {barrier} before {', '.join(early)} arrived"))
        if event.t > calm_s:
            passed_later.add(barrier)
    for barrier, seen in states.items():
        if len(seen) > 1:
            found.append(Violation(_CHECK, f"barrier {barrier} ended in more than one way: {sorted(seen)}"))
    if len(passed_later) < CALM_BARRIERS:
        found.append(Violation(_CHECK, f"{len(passed_later)} barriers succeeded after the last fault"))
    for event in history.of("fault"):
        if not event["fired"]:
            found.append(Violation("fired", f"{event['kind']} did not happen"))
    return found
