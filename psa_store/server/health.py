"""A server as its monitor sees it."""

from __future__ import annotations

import time
from collections.abc import Callable

from psa_store.logs import Waits
from psa_store.observe import Activity, EventKind, Events
from psa_store.observe.metrics import Metrics
from psa_store.server.event_loop import EventLoop

_SILENT_S = 10.0
"""An event loop turns at least a few times a second; only the copy of large shards that begins a term takes longer."""


class ServerHealth:
    """See :class:`psa_store.observe.Health`. Looks at the event loop from outside, so that it costs a step nothing."""

    def __init__(
        self,
        event_loop: EventLoop,
        metrics: Metrics,
        events: Events,
        member: Callable[[], str],
        lease_left_s: Callable[[], float],
        waits: Waits,
    ) -> None:
        self._event_loop = event_loop
        self._metrics = metrics
        self._events = events
        self._member = member
        self._lease_left_s = lease_left_s
        self._waits = waits
        self._finished: int | None = None

    @property
    def member(self) -> str:
        return self._member()

    def refresh(self) -> None:
        self._metrics.set("sent_bytes", self._event_loop.traffic.sent_bytes)
        self._metrics.set("received_bytes", self._event_loop.traffic.received_bytes)
        self._metrics.set("lease_left_seconds", max(0.0, self._lease_left_s()))
        finished = self._event_loop.finished
        if finished is not None and finished != self._finished:
            self._events.note(EventKind.FINISHED, f"the job is done, version {finished} is durable", version=finished)
        self._finished = finished

    @property
    def activity(self) -> Activity:
        shards = int(self._metrics.read().get("shards", 0))
        return Activity(self._event_loop.stage, shards=shards, held_up=self._waits.longest())

    def why_not_alive(self) -> str:
        silent_s = time.monotonic() - self._event_loop.turned_s
        return f"the event loop has not turned for {silent_s:.0f} s" if silent_s > _SILENT_S else ""

    def why_not_ready(self) -> str:
        if not self._event_loop.alive:
            return "the event loop has ended"
        if self._lease_left_s() <= 0:
            return "ZooKeeper is silent: this server does not serve until it answers"
        return "" if self._event_loop.stage != EventLoop.IDLE else "there is no term to serve"
