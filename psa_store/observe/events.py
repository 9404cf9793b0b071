"""What happens in a job, noted by the controller in one call each, and written to Redis by its monitor.

A note never waits: when Redis is away for long, the oldest notes go.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

from psa_store.cluster import NO_WORKER, Plan, TakeOver, View
from psa_store.logs import hide_passwords
from psa_store.observe.formatting import count
from psa_store.observe.heartbeat import Heartbeat

_NOTES_MAX = 256


class EventKind(StrEnum):
    """What an event is about."""

    CREATED = "created"
    TERM = "term"
    MEMBERS = "members"
    RECOVERED = "recovered"
    CHECKPOINT = "checkpoint"
    ROLLBACK = "rollback"
    CHANGED = "changed"
    """Of numbers of the optimizer."""
    FINISHED = "finished"
    SERVER_GONE = "server-gone"
    WORKER_GONE = "worker-gone"
    SERVER_LEFT = "server-left"
    """It withdrew its heartbeat before it went; a process that dies does not."""
    WORKER_LEFT = "worker-left"
    SERVER_JOINED = "server-joined"
    WORKER_JOINED = "worker-joined"
    HAND_OVER = "hand-over"
    SET_ASIDE = "set-aside"
    """A document that could not be read: another process wrote it."""


_LEFT = {EventKind.SERVER_GONE: EventKind.SERVER_LEFT, EventKind.WORKER_GONE: EventKind.WORKER_LEFT}
_GONE, _HAS_LEFT = "is gone", "has left"


@dataclass(frozen=True, slots=True)
class Event:
    """One event, as it is stored."""

    FORMAT: ClassVar[int] = 1

    time: float
    """Seconds since 1970."""
    kind: EventKind
    text: str
    """One sentence, for people."""
    term: int | None = None
    version: int | None = None
    member: str = ""
    computed_again: int | None = None
    """Of a recovery: how many versions are computed again."""


@dataclass(frozen=True, slots=True)
class Note:
    """An event that waits to be written."""

    event: Event
    reached: int | None = None
    """The version that this server had made when it decided to go back to that of the event."""

    def complete(self, heartbeats: Mapping[str, Heartbeat | None]) -> Event:
        """The event as it is written.

        Args:
            heartbeats: by member; a member that left in order has withdrawn its own, and what servers made before this
                term stands in theirs.
        """
        event = self.event
        if event.kind in _LEFT and event.member not in heartbeats:
            return replace(event, kind=_LEFT[event.kind], text=event.text.replace(_GONE, _HAS_LEFT))
        if self.reached is None or event.version is None or event.term is None:
            return event
        known = [each.metrics for each in heartbeats.values() if each is not None]
        others = [each["version"] for each in known if "version" in each and each.get("term", 0) < event.term]
        again = max(0, int(max([self.reached, *others])) - event.version)
        text = f"{event.text}, {again} {'version is' if again == 1 else 'versions are'} computed again"
        return replace(event, text=text, computed_again=again)


class Events:
    """The notes of one server. The plan follower writes, the monitor reads; safe for one thread each."""

    def __init__(self) -> None:
        self._notes: deque[Note] = deque(maxlen=_NOTES_MAX)
        self._seen: tuple[frozenset[str], frozenset[str]] | None = None

    @property
    def members(self) -> frozenset[str] | None:
        """All members of the job, while this server is its controller; else None."""
        seen = self._seen
        return None if seen is None else seen[0] | seen[1]

    def note(
        self,
        kind: EventKind,
        text: str,
        *,
        term: int | None = None,
        version: int | None = None,
        member: str = "",
        reached: int | None = None,
    ) -> None:
        """Remember an event, without waiting for anything. ``text``: one sentence; passwords in it are hidden."""
        self._notes.append(Note(Event(time.time(), kind, hide_passwords(text), term, version, member), reached))

    def drain(self) -> list[Note]:
        """Take all notes, the oldest first."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def put_back(self, notes: Iterable[Note]) -> None:
        """Make notes that could not be written the oldest again, as far as there is room."""
        room = _NOTES_MAX - len(self._notes)
        self._notes.extendleft(list(reversed(list(notes)))[: max(0, room)])

    # --- the plan follower notes

    def see(self, view: View) -> None:
        """Note members that joined or are gone; a new controller compares with those that the plan names."""
        now = frozenset(view.servers), frozenset(view.workers)
        before = self._seen if self._seen is not None else _named(view.plan)
        term = view.plan.term if view.plan else None
        for what, gone, joined, known, present in (
            ("server", EventKind.SERVER_GONE, EventKind.SERVER_JOINED, before[0], now[0]),
            ("worker", EventKind.WORKER_GONE, EventKind.WORKER_JOINED, before[1], now[1]),
        ):
            for member in sorted(known - present):
                self.note(gone, f"{what} {member} {_GONE}", term=term, member=member)
            for member in sorted(present - known):
                self.note(joined, f"{what} {member} has joined", term=term, member=member)
        self._seen = now

    def resign(self) -> None:
        """Forget the members: this server is not the controller, or no longer."""
        self._seen = None

    def took_over(self, action: TakeOver, before: Plan | None, plan: Plan, took_s: float, reached: int) -> None:
        """Note that a term has begun. ``reached``: the version that this server had made before."""
        text = f"{action.reason}; term {plan.term} began at version {plan.resume}, took {took_s:.2f} s"
        if before is None and plan.resume == 0:
            self.note(EventKind.CREATED, f"the job was created, with {_cut(plan)}", version=0)
        if before is None or not before.owners:
            self.note(EventKind.TERM, text, term=plan.term, version=plan.resume)
        elif action.reason.startswith("hand-over"):
            self.note(EventKind.HAND_OVER, text, term=plan.term, version=plan.resume)
        else:
            self.note(EventKind.RECOVERED, text, term=plan.term, version=plan.resume, reached=reached)

    def planned(self, before: Plan | None, plan: Plan, reason: str) -> None:
        """Note a change of the plan within its term, if the members are others now."""
        if before is not None and (before.cells, before.servers) == (plan.cells, plan.servers):
            return
        workers = len(set(plan.cells) - {NO_WORKER})
        text = f"{reason}: {workers} workers hold the {_cut(plan)}, {len(plan.servers)} servers the shards"
        self.note(EventKind.MEMBERS, text, term=plan.term)


def _cut(plan: Plan) -> str:
    """What workers share out."""
    return f"{plan.ranks} ranks" if plan.stages == 1 else f"{plan.stages} stages of {count(plan.ranks, 'rank')}"


def _named(plan: Plan | None) -> tuple[frozenset[str], frozenset[str]]:
    if plan is None:
        return frozenset(), frozenset()
    return frozenset(server.id for server in plan.servers), frozenset(plan.cells) - {NO_WORKER}
