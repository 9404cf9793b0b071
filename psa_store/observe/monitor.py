"""The thread that publishes how its process is: a heartbeat a second, and in the controller events and the curve."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace

from psa_store import logs
from psa_store.cluster import ProcessRole
from psa_store.config import Settings
from psa_store.config.listening import parse_advertised
from psa_store.errors import DependencyUnreachable, PsaError
from psa_store.observe.curve import Curve
from psa_store.observe.endpoint import TEXT, Answer, Endpoint, Route
from psa_store.observe.events import Events
from psa_store.observe.health import Health
from psa_store.observe.heartbeat import Heartbeat, Rates, finite, resident_bytes
from psa_store.observe.history import JobHistory
from psa_store.observe.metrics import Metrics
from psa_store.observe.prometheus import metrics_route
from psa_store.wire import host_identity

_PERIOD_S = 1.0
_REDIS_S = 0.5
"""How long Redis may take; what could not be written by then is dropped, or written a second later."""
_SILENT_S = 10.0
"""A thread that has not turned for so long counts as stuck."""
_STALE_S = 60.0
"""The heartbeat of a process that is no member is removed when it is so old."""


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
        self._metrics = metrics
        self._health = health
        self._events = events
        self._log = logs.get_logger()
        self._rates = Rates(("steps", "samples") if metrics.role is ProcessRole.WORKER else ())
        self._curve = Curve()
        self._turned_s = time.monotonic()
        self._warned = False
        self._stop = threading.Event()
        with ExitStack() as stack:
            self._history = stack.enter_context(closing(JobHistory(job, settings.redis, timeout_s=_REDIS_S)))
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
        """Write the last, withdraw the heartbeat, and release everything. Takes about a second if Redis is away."""
        self._stop.set()
        self._thread.join()
        self._resources.close()

    def _listen(self, settings: Settings, routes: Mapping[str, Route], stack: ExitStack) -> str:
        """Open the endpoint if that is possible. A worker may run where the address of servers is not its own."""
        try:
            endpoint = Endpoint(
                settings.bind,
                settings.metrics_port,
                routes,
                names=[name.strip() for name in settings.http_hosts.split(",") if name.strip()],
                token=settings.http_token,
                advertised=parse_advertised(settings.advertise).host if settings.advertise else None,
            )
            return stack.enter_context(closing(endpoint)).address
        except DependencyUnreachable as error:
            self._log.warning("no metrics over HTTP (PSA_METRICS_PORT=-1: do not try)", why=str(error))
            return ""

    # --- the thread

    def _run(self) -> None:
        written = self._turn()
        due_s = time.monotonic() + _PERIOD_S
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            written = self._turn()
            due_s = max(due_s + _PERIOD_S, time.monotonic())
        if written and self._turn():
            self._leave()

    def _turn(self) -> bool:
        """Write everything that is new; False if something could not be written."""
        self._turned_s = time.monotonic()
        try:
            self._history.beat(self._heartbeat())
            if self._events is not None:
                members = self._events.members  # read before events are written: only then may heartbeats of others go
                self._write_events(self._events)
                if members is not None:
                    self._govern(members)
        except PsaError as error:
            self._log.debug("nothing published", why=str(error))
            return False
        return True

    def _heartbeat(self) -> Heartbeat:
        health, metrics = self._health, self._metrics
        health.refresh()
        member = health.member
        if member != metrics.member:
            self._history.forget([metrics.member])
            metrics.member = member
        read, activity = finite(metrics.read()), health.activity
        rates = self._rates.update(time.monotonic(), read)
        return Heartbeat(
            member=member,
            role=metrics.role,
            time=time.time(),
            host=host_identity(),
            pid=os.getpid(),
            endpoint=self.address,
            resident_bytes=resident_bytes(),
            stage=activity.stage,
            shards=activity.shards,
            ranks=activity.ranks,
            stages=activity.stages,
            cells=activity.cells,
            waits_for=activity.waits_for,
            waits_s=activity.waits_s,
            held_up=activity.held_up and replace(activity.held_up, why=logs.hide_passwords(activity.held_up.why)),
            steps_per_s=rates.get("steps"),
            samples_per_s=rates.get("samples"),
            reported=activity.reported,
            metrics=read,
        )

    def _write_events(self, events: Events) -> None:
        notes = events.drain()
        try:
            heartbeats = self._history.heartbeats() if notes else {}
            while notes:
                self._history.add(notes[0].complete(heartbeats))
                del notes[0]
        finally:
            events.put_back(notes)

    def _govern(self, members: frozenset[str]) -> None:
        """In the controller: remove heartbeats that dead processes have left, and offer the next point of the curve."""
        heartbeats, time_s = self._history.heartbeats(), time.time()
        strange = [name for name in members if name in heartbeats and heartbeats[name] is None]
        if strange and not self._warned:
            self._log.warning("heartbeats cannot be read: another release wrote them", members=sorted(strange))
            self._warned = True
        others = {name: each for name, each in heartbeats.items() if name not in members}
        self._history.forget([name for name, each in others.items() if each is None or time_s - each.time > _STALE_S])
        present = [each for name, each in heartbeats.items() if name in members and each is not None]
        point = self._curve.point(time_s, present)
        if point is not None and self._history.offer(point):
            self._curve.kept(point)

    def _leave(self) -> None:
        try:
            self._history.forget([self._metrics.member])
        except PsaError as error:
            self._log.debug("the heartbeat stays", why=str(error))

    # --- routes

    def _healthz(self) -> Answer:
        silent_s = time.monotonic() - self._turned_s
        silence = f"its monitor has not turned for {silent_s:.0f} s" if silent_s > _SILENT_S else ""
        return _verdict(silence or self._health.why_not_alive())

    def _readyz(self) -> Answer:
        return _verdict(self._health.why_not_ready())


def _verdict(why_not: str) -> Answer:
    return (503, TEXT, f"{why_not}\n".encode()) if why_not else (200, TEXT, b"ok\n")
