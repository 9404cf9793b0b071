"""What failed in a job, and what it cost. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from psa_store.observe import EventKind, versions_again
from psa_store.observe.report.records import Event
from psa_store.observe.report.timeline import GONE, Moment, Rates, Segment, State

_TOGETHER_S = 1.0
"""Those whose end was noticed within this time died of the same."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Members that died together, or a term that had to begin for another reason."""

    time_s: float
    """When it was noticed; where the job had stood still before, since when. Seconds since 1970."""
    noticed_s: float
    """When it was noticed last ..."""
    recovered_s: float | None
    """... and when a term without it began; None if none had to: the worker's ranks were given to others."""
    servers: tuple[str, ...]
    workers: tuple[str, ...]
    text: str
    term: int
    """That term, or 0 ..."""
    version: int | None
    """... and at which version it began."""
    again: int
    """Versions that were computed again."""
    pause_s: float | None = None
    """How long training stood still, without that; None if it never went on. As exact as the curve is."""

    @property
    def what(self) -> str:
        """In a few words."""
        parts = [
            f"{len(members)} {word}s" if len(members) > 1 else word
            for word, members in (("server", self.servers), ("worker", self.workers))
            if members
        ]
        return f"{' and '.join(parts)} died" if parts else "new term"


def find_failures(events: Iterable[Event]) -> list[Failure]:
    """Each failure once, the oldest first, without its pause."""
    found: list[Failure] = []
    for event in events:
        if event.kind in GONE:
            if not found or event.time_s - found[-1].noticed_s > _TOGETHER_S:
                found.append(Failure(event.time_s, event.time_s, None, (), (), event.text, 0, None, 0))
            server = event.kind is EventKind.SERVER_GONE
            found[-1] = replace(
                found[-1],
                noticed_s=event.time_s,
                servers=found[-1].servers + ((event.member,) if server else ()),
                workers=found[-1].workers + (() if server else (event.member,)),
            )
        elif event.kind is EventKind.RECOVERED:
            cause = _cause(found, event)
            if cause is None:
                found.append(Failure(event.time_s, event.time_s, None, (), (), "", 0, None, 0))
                cause = len(found) - 1
            again = versions_again(event.text)
            found[cause] = replace(
                found[cause],
                recovered_s=event.time_s,
                text=event.text,
                term=event.term or 0,
                version=event.version,
                again=again,
            )
    return found


def _cause(found: Sequence[Failure], event: Event) -> int | None:
    """Which failure this term answers: that of a member that it names, else one that was noticed just now."""
    for index in range(len(found) - 1, -1, -1):
        each = found[index]
        if each.recovered_s is not None:
            continue
        if any(member in event.text for member in each.servers) or event.time_s - each.noticed_s <= _TOGETHER_S:
            return index
    return None


def with_pause(failure: Failure, timeline: Sequence[Moment], parts: Iterable[Segment], rates: Rates) -> Failure:
    """The same, with how long training stood still: time between two moments, less what the versions made then take."""
    stretches = list(parts)
    for each in stretches:
        if each.state is State.DOWN and each.begin_s < failure.time_s <= each.end_s:
            failure = replace(failure, time_s=each.begin_s)
    known = [each for each in timeline if each.kind is not EventKind.RECOVERED]
    before = next((each for each in reversed(known) if each.time_s <= failure.time_s), None)
    if before is None:
        return failure
    since_s = failure.noticed_s if failure.recovered_s is None else failure.recovered_s
    base = before.version if failure.version is None else failure.version
    # A point may be made of heartbeats from before: those are of an older term.
    later = [each for each in known if each.time_s >= since_s and each.term >= failure.term]
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
    made_s = (after.version - before.version + failure.again) / rate if rate else 0.0
    return replace(failure, pause_s=max(0.0, passed_s - made_s))
