"""The thread that tells how its process is: a heartbeat a second, and in the controller also events and the curve."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing

from psa_store import logs
from psa_store.cluster import ProcessRole
from psa_store.config import Settings
from psa_store.errors import DependencyUnreachable, PsaError
from psa_store.observe.endpoint import Endpoint, Route
from psa_store.observe.events import Events
from psa_store.observe.health import Health
from psa_store.observe.heartbeat import Curve, Rates, finite, resident_bytes
from psa_store.observe.metrics import Metrics
from psa_store.observe.prometheus import metrics_route
from psa_store.storage import History
from psa_store.wire import host_identity

_PERIOD_S = 1.0
_REDIS_S = 0.5
"""How long Redis may take; what it does not take in that time is dropped, or told a second later."""
_SILENT_S = 10.0
"""A loop that has not turned for so long is sick."""
_STALE_S = 60.0
"""A heartbeat of nobody is removed when it is so old."""
_TEXT = "text/plain; charset=utf-8"


class Monitor:
    """Owns the thread ``psa-monitor``, a connection to Redis, and the HTTP endpoint.

    Redis may come and go: then heartbeats and points are dropped, and events wait.

    Args:
        events: what this server notes as controller; None in workers.
        pages: further routes of the endpoint.
    """

    def __init__(
        self,
        job: str,
        metrics: Metrics,
        health: Health,
        settings: Settings,
        *,
        events: Events | None = None,
        pages: Mapping[str, Route] | None = None,
    ) -> None:
        assert settings.redis is not None
        self._job = job
        self._metrics = metrics
        self._health = health
        self._events = events
        self._log = logs.get_logger()
        self._rates = Rates(("steps", "samples") if metrics.role is ProcessRole.WORKER else ())
        self._curve = Curve()
        self._turned_s = time.monotonic()
        self._puzzled = False
        self._stop = threading.Event()
        with ExitStack() as stack:
            self._history = stack.enter_context(closing(History(settings.redis, timeout_s=_REDIS_S)))
            routes: dict[str, Route] = {
                "/metrics": metrics_route(job, metrics),
                "/healthz": self._healthz,
                "/readyz": self._readyz,
                **(pages or {}),
            }
            self.address = ""
            """Of the endpoint, "host:port"; empty if there is none."""
            if settings.metrics_port >= 0:
                self.address = self._listen(settings, routes, stack)
            self._resources = stack.pop_all()
        self._thread = threading.Thread(target=self._run, name="psa-monitor")
        self._thread.start()

    def close(self) -> None:
        """Tell the last, withdraw the heartbeat, and release everything. Takes about a second if Redis is away."""
        self._stop.set()
        self._thread.join()
        self._resources.close()

    def _listen(self, settings: Settings, routes: Mapping[str, Route], stack: ExitStack) -> str:
        """Open the endpoint if that is possible. A worker may run where the address of servers is not its own."""
        try:
            return stack.enter_context(closing(Endpoint(settings.bind, settings.metrics_port, routes))).address
        except DependencyUnreachable as error:
            self._log.warning("no metrics over HTTP (PSA_METRICS_PORT=-1: do not try)", why=str(error))
            return ""

    # --- the thread

    def _run(self) -> None:
        told = self._tell()
        due_s = time.monotonic() + _PERIOD_S
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            told = self._tell()
            due_s = max(due_s + _PERIOD_S, time.monotonic())
        if told and self._tell():
            self._leave()

    def _tell(self) -> bool:
        """Look at everything once, and tell it; False if something could not be told."""
        self._turned_s = time.monotonic()
        try:
            self._heartbeat()
            if self._events is not None:
                members = self._events.members  # before the events: heartbeats are removed when it was told who is gone
                self._write_events(self._events)
                if members is not None:
                    self._govern(members)
        except PsaError as error:
            self._log.debug("not told", why=str(error))
            return False
        except Exception as error:  # such as a heartbeat of another version of psa, which must not silence this process
            log = self._log.debug if self._puzzled else self._log.warning
            log("what others tell cannot be read, so this process tells less", exc_info=error)
            self._puzzled = True
        return True

    def _heartbeat(self) -> None:
        health, metrics = self._health, self._metrics
        health.refresh()
        member = health.member
        if member != metrics.member:
            self._history.forget(self._job, [metrics.member])
            metrics.member = member
        read = finite(metrics.read())
        document = {
            "member": member,
            "role": metrics.role.value,
            "time": time.time(),
            "host": host_identity(),
            "pid": os.getpid(),
            "endpoint": self.address,
            "resident_bytes": resident_bytes(),
            "metrics": read,
            "rates": self._rates.update(time.monotonic(), read),
            **health.describe(),
        }
        self._history.heartbeat(self._job, member, json.dumps(document, allow_nan=False))

    def _write_events(self, events: Events) -> None:
        notes = events.drain()
        try:
            heartbeats = self._history.heartbeats(self._job) if notes else {}
            while notes:
                self._history.event(self._job, notes[0].document(heartbeats))
                del notes[0]
        finally:
            events.put_back(notes)

    def _govern(self, members: frozenset[str]) -> None:
        """For the controller: the next point of the curve, and what those have left who left without a word."""
        heartbeats, time_s = self._history.heartbeats(self._job), time.time()
        self._history.forget(
            self._job,
            [
                name
                for name, each in heartbeats.items()
                if name not in members and time_s - each.get("time", 0.0) > _STALE_S
            ],
        )
        present = [each for name, each in heartbeats.items() if name in members]
        point = self._curve.point(time_s, present)
        if point is not None and self._history.point(self._job, point):
            self._curve.kept(point)

    def _leave(self) -> None:
        try:
            self._history.forget(self._job, [self._metrics.member])
        except PsaError as error:
            self._log.debug("the heartbeat stays", why=str(error))

    # --- routes

    def _healthz(self) -> tuple[int, str, bytes]:
        silent_s = time.monotonic() - self._turned_s
        silence = f"its monitor has not turned for {silent_s:.0f} s" if silent_s > _SILENT_S else ""
        return _verdict(silence or self._health.why_sick())

    def _readyz(self) -> tuple[int, str, bytes]:
        return _verdict(self._health.why_not_ready())


def _verdict(why_not: str) -> tuple[int, str, bytes]:
    return (503, _TEXT, f"{why_not}\n".encode()) if why_not else (200, _TEXT, b"ok\n")
