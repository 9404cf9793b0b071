"""Says what a server waits for, while workers wait for it: gradients, norms of another server, Redis, ZooKeeper.

A stall is looked for from outside, once a second: a step that is made in time costs nothing.
"""

from __future__ import annotations

from psa_store.logs import Waits
from psa_store.logs.waits import SAY_AFTER_S
from psa_store.server.aggregator import Aggregator
from psa_store.server.waiters import Waiters

LOOK_EVERY_S = 1.0
_USUAL = 2.0
"""A step may take so many times what the one before took until it is said what it waits for."""


class Stalls:
    """Used by the event loop's thread."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._version: int | None = None
        """The version that was there at the last look."""
        self._came_at_s = 0.0
        self._step_s = 0.0
        """How long the step before it took; 0 if that is not known."""

    def look(self, now_s: float, aggregator: Aggregator | None, waiters: Waiters, *, lapsed: bool) -> None:
        """Note what is waited for now. ``lapsed``: this server must not serve, since ZooKeeper is silent."""
        self._on("lease", "ZooKeeper to answer: until then this server does not serve" if lapsed else "")
        if aggregator is None:
            self._version = None
            self._on("step", "")
            self._on("finish", "")
            return
        self._note_version(now_s, aggregator.version)
        missing = aggregator.missing
        delayed = bool(missing) and waiters.await_next(aggregator.version)
        self._on("step", missing if delayed else "", say_after_s=max(SAY_AFTER_S, _USUAL * self._step_s))
        wanted = max(waiters.awaited, default=None)
        stands = f"version {aggregator.version} is here, {aggregator.committed} is durable, {aggregator.stage}"
        self._on(
            "finish",
            "" if wanted is None else f"version {wanted} to be durable, for workers that wait for that",
            f"{stands}, missing: {missing}" if missing else stands,
        )

    def _on(self, place: str, what: str, why: str = "", *, say_after_s: float = SAY_AFTER_S) -> None:
        if what:
            self._waits.on(place, what, why, say_after_s=say_after_s)
        else:
            self._waits.over(place)

    def _note_version(self, now_s: float, version: int) -> None:
        if self._version is None or version < self._version:
            self._step_s = 0.0
        elif version > self._version:
            self._step_s = (now_s - self._came_at_s) / (version - self._version)
        else:
            return
        self._version, self._came_at_s = version, now_s
