"""The history of a job as types: the one place that reads and writes heartbeats, events and the curve.

What this release cannot read, for another one or another program wrote it, is set aside: the rest can be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing, suppress
from typing import TypeVar

from psa_store.config import Settings
from psa_store.errors import DependencyUnreachable
from psa_store.job.document import Damaged, Document, from_text, judged, to_text
from psa_store.observe.curve import Point
from psa_store.observe.events import Event
from psa_store.observe.heartbeat import Heartbeat
from psa_store.storage import History, keys, known_redis

D = TypeVar("D", bound=Document)


class JobHistory:
    """Heartbeats, events and the curve of one job. Thread-safe.

    Every method raises DependencyUnreachable if Redis does not answer within ``timeout_s``.
    """

    def __init__(self, job: str, redis: str, *, timeout_s: float) -> None:
        self._job = job
        self._history = History(job, redis, timeout_s=timeout_s)
        self.damaged: dict[str, Damaged] = {}
        """By key that was read, the newest of what stands there and can not be read."""

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
        texts = self._history.heartbeats()
        return dict(zip(texts, self._read(Heartbeat, key, texts.values()), strict=True))

    def forget(self, members: Iterable[str]) -> None:
        """Remove the heartbeats of members that are gone."""
        self._history.forget(members)

    def add(self, event: Event) -> None:
        """Add an event, unless exactly this one is among the newest. There is a limit; the oldest go."""
        self._history.event(to_text(event))

    def events(self) -> list[Event]:
        """All that are kept and can be read, the oldest first."""
        return _readable(self._read(Event, keys.events(self._job), self._history.events()))

    def offer(self, point: Point) -> bool:
        """Offer a point to the curve; it is kept, and the answer is True, if the interval since the last has passed."""
        return self._history.point(to_text(point))

    def curve(self) -> list[Point]:
        """All points that can be read, the oldest first."""
        return _readable(self._read(Point, keys.curve(self._job), self._history.curve()))

    def _read(self, kind: type[D], key: str, texts: Iterable[str]) -> list[D | None]:
        """What texts under a key say; None: another release or program wrote it."""
        self.damaged.pop(key, None)
        found: list[D | None] = []
        for text in texts:
            judgement = judged(lambda stored: from_text(kind, stored, f"{key} in Redis"), text, key)
            if isinstance(judgement, Damaged):
                self.damaged[key] = judgement
                found.append(None)
            else:
                found.append(judgement)
        return found


def _readable(found: Iterable[D | None]) -> list[D]:
    return [each for each in found if each is not None]


def add_if_possible(job: str, settings: Settings, event: Event) -> None:
    """Add an event of what was done to a job by a person or a script; it is done, written here or not."""
    if settings.monitor:
        with suppress(DependencyUnreachable), closing(JobHistory.from_settings(job, settings)) as history:
            history.add(event)
