"""What failed in a job, and what it cost. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from psa_store.observe.events import Event, EventKind
from psa_store.observe.report.timeline import GONE, Moment, Rates, Segment, State

_TOGETHER_S = 1.0
"""Members whose end was noticed within this time died of the same cause."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Members that died together, or a term that had to begin for another reason."""

    time: float
    """When it was noticed; where the job had stood still before, since when. Seconds since 1970."""
    what: str
    """In a few words."""
    servers: tuple[str, ...]
    workers: tuple[str, ...]
    text: str
    """As the controller noted it."""
    noticed_s: float
    """When it was noticed last ..."""
    recovered_s: float | None = None
    """... and when a term without it began; None if none had to: the worker's ranks were given to others."""
    term: int | None = None
    """That term ..."""
    version: int | None = None
    """... and at which version it began."""
    computed_again: int = 0
    """Versions that were computed again."""
    pause_s: float | None = None
    """How long training stood still, without that; None if it never went on. As exact as the curve is."""


def find_failures(events: Iterable[Event]) -> list[Failure]:
    """Each failure once, the oldest first, without its pause."""
    found: list[Failure] = []
    for event in events:
        if event.kind in GONE:
            if not found or event.time - found[-1].noticed_s > _TOGETHER_S:
                found.append(_new(event, event.text))
            found[-1] = _with_member(found[-1], event)
        elif event.kind is EventKind.RECOVERED:
            cause = _cause(found, event)
            if cause is None:
                found.append(_new(event, ""))
                cause = len(found) - 1
            found[cause] = replace(
                found[cause],
                recovered_s=event.time,
                text=event.text,
                term=event.term,
                version=event.version,
                computed_again=event.computed_again or 0,
            )
    return found


def _new(event: Event, text: str) -> Failure:
    return Failure(event.time, "new term", (), (), text, noticed_s=event.time)


def _with_member(failure: Failure, event: Event) -> Failure:
    """The same, with the member that the event is about."""
    is_server = event.kind is EventKind.SERVER_GONE
    servers = failure.servers + ((event.member,) if is_server else ())
    workers = failure.workers + (() if is_server else (event.member,))
    parts = [
        f"{len(members)} {word}s" if len(members) > 1 else word
        for word, members in (("server", servers), ("worker", workers))
        if members
    ]
    what = f"{' and '.join(parts)} died"
    return replace(failure, noticed_s=event.time, what=what, servers=servers, workers=workers)


def _cause(found: Sequence[Failure], event: Event) -> int | None:
    """The failure that this term answers: that of a member that it names, else one that was noticed just now."""
    for index in range(len(found) - 1, -1, -1):
        each = found[index]
        if each.recovered_s is not None:
            continue
        if any(member in event.text for member in each.servers) or event.time - each.noticed_s <= _TOGETHER_S:
            return index
    return None


def with_pause(failure: Failure, timeline: Sequence[Moment], parts: Iterable[Segment], rates: Rates) -> Failure:
    """The same, with how long training stood still: time between two moments, less what the versions made then take."""
    stretches = list(parts)
    for each in stretches:
        if each.state is State.DOWN and each.begin_s < failure.time <= each.end_s:
            failure = replace(failure, time=each.begin_s)
    known = [each for each in timeline if each.kind is not EventKind.RECOVERED]
    before = next((each for each in reversed(known) if each.time_s <= failure.time), None)
    if before is None:
        return failure
    since_s = failure.noticed_s if failure.recovered_s is None else failure.recovered_s
    base = before.version if failure.version is None else failure.version
    # A point may be made of heartbeats from before: those are of an older term.
    later = [each for each in known if each.time_s >= since_s and each.term >= (failure.term or 0)]
    after = next((each for each in later if each.version > base), None)
    if after is None:
        return failure
    rested_s = sum(
        max(0.0, min(each.end_s, after.time_s) - max(each.begin_s, before.time_s))
        for each in stretches
        if each.state is State.REST
    )
    passed_s = after.time_s - before.time_s - rested_s
    rate = rates.of(before.workers)
    made_s = (after.version - before.version + failure.computed_again) / rate if rate else 0.0
    return replace(failure, pause_s=max(0.0, passed_s - made_s))
