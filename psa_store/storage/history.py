"""The history of jobs in Redis, as JSON: heartbeats, events, and the curve. Thread-safe.

Three small things per job: a hash with the newest heartbeat of each member, a stream of events, and a stream of
points that always shows the whole run. None of them is needed for training. Whatever is written here is written
again after an answer was lost, and counts once: a heartbeat replaces the one before, an event is known by its text,
and a point comes too soon after itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from psa_store.errors import DataIntegrity
from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.connection import text

EVENTS_MAX = 2000
POINTS_MAX = 4096
_CONNECTIONS_MAX = 2


class History:
    """Heartbeats, events and the curve of jobs in one Redis.

    Every method raises DependencyUnreachable if Redis does not answer within ``timeout_s``; those that read raise
    DataIntegrity if what they find is not JSON.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._caller = Caller(url, timeout_s, _CONNECTIONS_MAX)
        self._client = self._caller.client

    def close(self) -> None:
        self._caller.close()

    # --- heartbeats

    def heartbeat(self, job: str, member: str, text: str) -> None:
        """Replace the heartbeat of a member; ``text`` is a JSON object."""
        self._caller.retrying(lambda: self._client.hset(keys.heartbeats(job), member, text))

    def heartbeats(self, job: str) -> dict[str, dict[str, Any]]:
        """By member, the newest, which may be old."""
        found: Mapping[Any, Any] = self._caller.retrying(lambda: self._client.hgetall(keys.heartbeats(job)))
        return {text(member): _document(keys.heartbeats(job), heartbeat) for member, heartbeat in found.items()}

    def forget(self, job: str, members: Iterable[str]) -> None:
        """Remove the heartbeats of members that are gone."""
        gone = list(members)
        if gone:
            self._caller.retrying(lambda: self._client.hdel(keys.heartbeats(job), *gone))

    # --- events

    def event(self, job: str, text: str) -> None:
        """Add an event, unless exactly this one is among the newest. The oldest go when there are EVENTS_MAX."""
        self._caller.functions([("psa_event", [keys.events(job)], [text, EVENTS_MAX])])

    def events(self, job: str) -> list[dict[str, Any]]:
        """All that are kept, the oldest first."""
        return self._stream(keys.events(job))

    # --- the curve

    def point(self, job: str, text: str) -> bool:
        """Offer a point; it is kept, and the answer is True, if the interval since the last one has passed.

        The interval is a second at first. When there are more than POINTS_MAX points, every other one is deleted and
        the interval doubles (``psa_point`` in functions.lua). It lies in Redis, so a resumed job goes on with it.
        """
        its_keys = [keys.curve(job), keys.curve_interval(job)]
        (kept,) = self._caller.functions([("psa_point", its_keys, [text, POINTS_MAX])])
        return bool(kept)

    def curve(self, job: str) -> list[dict[str, Any]]:
        """All points, the oldest first."""
        return self._stream(keys.curve(job))

    def _stream(self, key: str) -> list[dict[str, Any]]:
        entries: Any = self._caller.retrying(lambda: self._client.xrange(key))
        return [_document(key, fields.get(b"json", b"")) for _, fields in entries]


def _document(key: str, found: bytes) -> dict[str, Any]:
    try:
        document = json.loads(found)
    except ValueError as error:
        raise DataIntegrity(f"{key} in Redis holds what is no JSON: {error}. It may be deleted.") from error
    if not isinstance(document, dict):
        raise DataIntegrity(f"{key} in Redis holds {document!r} where an object should be. It may be deleted.")
    return document
