"""What a process waits for: said once that has lasted 5 s, then at doubling intervals, and shown in its heartbeat.

Each place that waits has a name, and looks at what it waits for again and again::

    while not there():
        waits.on("plan", "a server of the job", why="none has taken the shards")
        pause()
    waits.over("plan")

No place says more than one line a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from psa_store.logs.setup import get_logger

SAY_AFTER_S = 5.0
_SAY_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Wait:
    """One wait that goes on."""

    what: str
    why: str
    """What is known of the cause; may be empty."""
    lasts_s: float

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" if self.why else self.what


@dataclass(slots=True)
class _Place:
    what: str
    why: str
    since_s: float
    say_after_s: float
    said: bool = False


class Waits:
    """Of one process, or of one worker in it. Thread-safe.

    Args:
        clock: monotonic.
        say: is given the line and what belongs to it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, say: Callable[[str, Wait], None] | None = None):
        self._clock = clock
        self._say = say or _log
        self._lock = threading.Lock()
        self._places: dict[str, _Place] = {}
        self._said_at_s: dict[str, float] = {}
        """By place, when it said something last."""

    def on(self, place: str, what: str, why: str = "", *, say_after_s: float = SAY_AFTER_S) -> None:
        """It is still waited for. Another ``what`` is another wait; ``why`` may change.

        ``say_after_s``: 0 if it is a failure, which is said at once; more where it is usual to wait so long.
        """
        now_s = self._clock()
        at = self._places.get(place)
        if at is not None and at.what != what:
            self.over(place)
        with self._lock:
            at = self._places.get(place)
            if at is None:
                at = self._places[place] = _Place(what, why, now_s, say_after_s)
            at.why = why
            lasts_s = now_s - at.since_s
            if lasts_s < at.say_after_s or now_s < self._said_at_s.get(place, float("-inf")) + _SAY_EVERY_S:
                return
            while at.say_after_s <= lasts_s:
                at.say_after_s = max(SAY_AFTER_S, 2 * at.say_after_s)
            at.said = True
            self._said_at_s[place] = now_s
        self._say("waiting for", Wait(what, why, lasts_s))

    def over(self, place: str) -> None:
        """Nothing is waited for there any more."""
        if place not in self._places:  # most often: without the lock
            return
        now_s = self._clock()
        with self._lock:
            at = self._places.pop(place, None)
        if at is not None and at.said and now_s - at.since_s >= _SAY_EVERY_S:
            self._say("waited for", Wait(at.what, "", now_s - at.since_s))

    def longest(self) -> Wait | None:
        """The wait that has lasted longest, if one has lasted so long that it is said."""
        now_s = self._clock()
        with self._lock:
            said = [at for at in self._places.values() if at.said]
        first = min(said, key=lambda at: at.since_s, default=None)
        return None if first is None else Wait(first.what, first.why, round(now_s - first.since_s, 1))


def _log(event: str, wait: Wait) -> None:
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - wait.lasts_s))
    why = {"why": wait.why} if wait.why else {}
    get_logger().warning(f"{event} {wait.what}", lasts_s=round(wait.lasts_s, 1), since=since, **why)
