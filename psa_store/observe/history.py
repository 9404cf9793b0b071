"""The history of a job as types: the one place that reads and writes heartbeats, events and the curve.

A document that this release cannot read, for another one wrote it, is set aside: it breaks nothing that can be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing, suppress
from typing import TypeVar

from psa_store.config import Settings
from psa_store.errors import DataIntegrity, DependencyUnreachable
from psa_store.job.document import Document, from_fields, to_text
from psa_store.observe.curve import Point
from psa_store.observe.events import Event
from psa_store.observe.heartbeat import Heartbeat
from psa_store.storage import History, keys, known_redis

D = TypeVar("D", bound=Document)


class JobHistory:
    """Heartbeats, events and the curve of one job. Thread-safe.

    Every method raises DependencyUnreachable if Redis does not answer within ``timeout_s``; those that read raise
    DataIntegrity if what they find is no JSON object.
    """

    def __init__(self, job: str, redis: str, *, timeout_s: float) -> None:
        self._job = job
        self._history = History(job, redis, timeout_s=timeout_s)

    @classmethod
    def from_settings(cls, job: str, settings: Settings) -> JobHistory:
        """In the Redis of the settings; raises UsageError if they do not say where it is."""
        return cls(job, known_redis(settings), timeout_s=settings.connect_timeout_s)

    def close(self) -> None:
        self._history.close()

    def beat(self, heartbeat: Heartbeat) -> None:
        """Replace the heartbeat of its member."""
        self._history.heartbeat(heartbeat.member, to_text(heartbeat))

    def heartbeats(self) -> dict[str, Heartbeat | None]:
        """By member, the newest of each; None if it cannot be read."""
        key = keys.heartbeats(self._job)
        return {member: _read(Heartbeat, key, text) for member, text in self._history.heartbeats().items()}

    def forget(self, members: Iterable[str]) -> None:
        """Remove the heartbeats of members that are gone."""
        self._history.forget(members)

    def add(self, event: Event) -> None:
        """Add an event, unless exactly this one is among the newest. There is a limit; the oldest go."""
        self._history.event(to_text(event))

    def events(self) -> list[Event]:
        """All that are kept and can be read, the oldest first."""
        return _readable(Event, keys.events(self._job), self._history.events())

    def offer(self, point: Point) -> bool:
        """Offer a point to the curve; it is kept, and the answer is True, if the interval since the last has passed."""
        return self._history.point(to_text(point))

    def curve(self) -> list[Point]:
        """All points that can be read, the oldest first."""
        return _readable(Point, keys.curve(self._job), self._history.curve())


def add_if_possible(job: str, settings: Settings, event: Event) -> None:
    """Add an event of what was done to a job by a person or a script; it is done, written here or not."""
    if settings.monitor:
        with suppress(DependencyUnreachable), closing(JobHistory.from_settings(job, settings)) as history:
            history.add(event)


def _readable(kind: type[D], key: str, texts: Iterable[str]) -> list[D]:
    return [found for text in texts if (found := _read(kind, key, text)) is not None]


def _read(kind: type[D], key: str, text: str) -> D | None:
    """None: another release wrote it."""
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise DataIntegrity(f"{key} in Redis holds {text[:80]!r} where a JSON object should be. It may be deleted.")
    try:
        return from_fields(kind, fields, kind.__name__)
    except DataIntegrity:
        return None
