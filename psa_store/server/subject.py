"""A server as its monitor sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from psa_store.monitor import EventKind, Events
from psa_store.server.engine import Engine
from psa_store.telemetry import Vitals

_SILENT_S = 10.0
"""An engine turns at least a few times a second; only the copy of large shards that begins an epoch takes longer."""


class ServerSubject:
    """See :class:`psa_store.monitor.Subject`. Looks at the engine from outside, so that it costs a step nothing."""

    def __init__(
        self,
        engine: Engine,
        vitals: Vitals,
        events: Events,
        member: Callable[[], str],
        lease_left_s: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._vitals = vitals
        self._events = events
        self._member = member
        self._lease_left_s = lease_left_s
        self._finished: int | None = None

    @property
    def member(self) -> str:
        return self._member()

    def refresh(self) -> None:
        self._vitals.set("sent_bytes", self._engine.traffic.sent_bytes)
        self._vitals.set("received_bytes", self._engine.traffic.received_bytes)
        self._vitals.set("lease_left_seconds", max(0.0, self._lease_left_s()))
        finished = self._engine.finished
        if finished is not None and finished != self._finished:
            self._events.note(EventKind.FINISHED, f"the job is done, version {finished} is durable", version=finished)
        self._finished = finished

    def describe(self) -> Mapping[str, Any]:
        return {"stage": self._engine.stage, "shards": int(self._vitals.read().get("shards", 0))}

    def why_sick(self) -> str:
        silent_s = time.monotonic() - self._engine.turned_s
        return f"the engine has not turned for {silent_s:.0f} s" if silent_s > _SILENT_S else ""

    def why_not_ready(self) -> str:
        if not self._engine.alive:
            return "the engine has ended"
        if self._lease_left_s() <= 0:
            return "ZooKeeper is silent: this server does not serve until it is heard"
        return "" if self._engine.stage != Engine.IDLE else "there is no epoch to serve"
