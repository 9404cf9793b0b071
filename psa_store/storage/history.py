"""The history of a job in Redis, as texts: heartbeats, events, and the curve. Thread-safe.

Three small things: a hash with the newest heartbeat of each member, a stream of events, and a stream of
points that always shows the whole run. None of them is needed for training. Whatever is written here is written
again after an answer was lost, and counts once: a heartbeat replaces the one before, an event is known by its text,
and a point comes too soon after itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.connection import text

EVENTS_MAX = 2000
POINTS_MAX = 4096
_CONNECTIONS_MAX = 2


class History:
    """Heartbeats, events and the curve of one job; what the texts say is the caller's.

    Every method raises DependencyUnreachable if Redis does not answer within ``timeout_s``.
    """

    def __init__(self, job: str, url: str, *, timeout_s: float) -> None:
        self._job = job
        self._caller = Caller(url, timeout_s, _CONNECTIONS_MAX)
        self._client = self._caller.client

    def close(self) -> None:
        self._caller.close()

    def heartbeat(self, member: str, text: str) -> None:
        """Replace the heartbeat of a member."""
        self._caller.retrying(lambda: self._client.hset(keys.heartbeats(self._job), member, text))

    def heartbeats(self) -> dict[str, str]:
        """By member, the newest, which may be old."""
        found: Mapping[Any, Any] = self._caller.retrying(lambda: self._client.hgetall(keys.heartbeats(self._job)))
        return {text(member): text(heartbeat) for member, heartbeat in found.items()}

    def forget(self, members: Iterable[str]) -> None:
        """Remove the heartbeats of members that are gone."""
        gone = list(members)
        if gone:
            self._caller.retrying(lambda: self._client.hdel(keys.heartbeats(self._job), *gone))

    def event(self, text: str) -> None:
        """Add an event, unless exactly this one is among the newest. The oldest go when there are EVENTS_MAX."""
        self._caller.functions([("psa_event", [keys.events(self._job)], [text, EVENTS_MAX])])

    def events(self) -> list[str]:
        """All that are kept, the oldest first."""
        return self._stream(keys.events(self._job))

    def point(self, text: str) -> bool:
        """Offer a point; it is kept, and the answer is True, if the interval since the last one has passed.

        The interval is a second at first. When there are more than POINTS_MAX points, every other one is deleted and
        the interval doubles (``psa_point`` in functions.lua). It lies in Redis, so a resumed job goes on with it.
        """
        its_keys = [keys.curve(self._job), keys.curve_interval(self._job)]
        (kept,) = self._caller.functions([("psa_point", its_keys, [text, POINTS_MAX])])
        return bool(kept)

    def curve(self) -> list[str]:
        """All points, the oldest first."""
        return self._stream(keys.curve(self._job))

    def _stream(self, key: str) -> list[str]:
        entries: Any = self._caller.retrying(lambda: self._client.xrange(key))
        return [text(fields.get(b"json", b"")) for _, fields in entries]
