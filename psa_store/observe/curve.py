"""The curve of a job: one point a second of loss, speed, version and members, made by the controller of heartbeats.

The curve always shows the whole run and never grows beyond POINTS_MAX points. It is thinned in Redis, by the function
``psa_point`` of ``storage/functions.lua``: a point that comes before its interval has passed is not added; when there
are too many points, every other one is deleted and the interval doubles. It is done there, in one atomic call, because
any server may become the controller at any moment and goes on with the same curve: whether a point is due, and what has
to go, follows from what is stored and from the clock of Redis, not from the memory or the clock of one server.

Pure: no I/O, no threads, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import BeforeValidator

from psa_store.cluster import ProcessRole
from psa_store.job.document import ADDED_LATER
from psa_store.observe.heartbeat import Heartbeat, mean_reported

FRESH_S = 5.0
"""A heartbeat that is older than this does not count."""


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measured = Annotated[float | None, BeforeValidator(_finite)]
"""A number that may not be known. JSON has no NaN and no infinity: they are read as not known."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the curve."""

    FORMAT: ClassVar[int] = 1

    time: float
    """Seconds since 1970, by the clock of the controller."""
    version: int
    """That all servers have."""
    committed: int = 0
    term: int = 0
    loss: Measured = None
    """Of rank 0, as its script gave it."""
    learning_rate: Measured = None
    gradient_norm: Measured = None
    samples_per_s: float = 0.0
    steps_per_s: float = 0.0
    workers: int = 0
    servers: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What scripts gave to ``worker.step(metrics=)``: the weighted mean of the newest of each rank."""
    waiting: Measured = field(default=None, metadata=ADDED_LATER)
    """Of a model in stages: the share of their time that workers have waited since the point before."""


class Curve:
    """Makes points of heartbeats; remembers the last, to know whether and how fast the job moves."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        """When the server that is behind was at which version, as its newest heartbeat says."""
        self._per_s = 0.0
        self._kept: tuple[int, int] | None = None
        self._spent: Mapping[str, tuple[float, float]] = {}
        """By worker of a model in stages, how long it has computed and waited ..."""
        self._spent_before: Mapping[str, tuple[float, float]] = {}
        """... and what that was at the last point that was kept."""

    def point(self, time_s: float, heartbeats: Iterable[Heartbeat]) -> Point | None:
        """The point that the heartbeats make; None if the job has not moved since the last that was kept.

        Args:
            time_s: seconds since 1970, as in the heartbeats.
            heartbeats: of members that are there; old ones do not count.
        """
        fresh = [each for each in heartbeats if abs(time_s - each.time) <= FRESH_S]
        servers = [each for each in fresh if each.role is ProcessRole.SERVER]
        workers = [each for each in fresh if each.role is ProcessRole.WORKER]
        serving = [each for each in servers if each.shards and "version" in each.metrics]
        if not serving:
            return None
        slowest = min(serving, key=lambda each: each.metrics["version"])
        version = slowest.metrics["version"]
        self._follow(slowest.time, version)
        norms = [each.metrics["gradient_norm"] for each in serving if "gradient_norm" in each.metrics]
        rank_0: Mapping[str, float] = next((each.metrics for each in workers if each.has_loss_of(0)), {})
        point = Point(
            time=time_s,
            version=int(version),
            committed=int(min(each.metrics.get("committed_version", 0) for each in serving)),
            term=int(max(each.metrics.get("term", 0) for each in serving)),
            loss=rank_0.get("loss"),
            learning_rate=rank_0.get("learning_rate"),
            gradient_norm=norms[0] if norms else None,
            samples_per_s=round(sum(each.samples_per_s or 0.0 for each in workers), 3),
            steps_per_s=round(self._per_s, 3),
            workers=len(workers),
            servers=len(servers),
            metrics=mean_reported(workers),
            waiting=self._waiting(workers),
        )
        return None if self._kept == (point.term, point.version) else point

    def kept(self, point: Point) -> None:
        """Note that this one is on the curve."""
        self._kept = point.term, point.version
        self._spent_before = self._spent

    def _waiting(self, workers: Iterable[Heartbeat]) -> float | None:
        self._spent = {
            each.member: (each.metrics.get("compute_seconds", 0.0), each.metrics.get("wait_seconds", 0.0))
            for each in workers
            if each.cells
        }
        pairs = [(self._spent_before[name], now) for name, now in self._spent.items() if name in self._spent_before]
        computed_s, waited_s = (sum(now[part] - before[part] for before, now in pairs) for part in (0, 1))
        return round(waited_s / (computed_s + waited_s), 4) if computed_s + waited_s > 0.0 else None

    def _follow(self, beat_s: float, version: float) -> None:
        """Bring the speed up to date, by the clock of the server: between two calls there may have been no heartbeat of
        it, or two."""
        if self._last is not None and beat_s > self._last[0]:
            self._per_s = max(0.0, (version - self._last[1]) / (beat_s - self._last[0]))
        if self._last is None or beat_s > self._last[0]:
            self._last = beat_s, version
