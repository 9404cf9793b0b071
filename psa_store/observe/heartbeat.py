"""What a heartbeat says, and the point of the curve that all heartbeats together make. Pure, but for this process's
memory."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_store.cluster import ProcessRole

_WINDOW_S = 5.0
FRESH_S = 5.0
"""A heartbeat that is older than this says nothing of the present."""


class Rates:
    """How fast counters grow, over the last few seconds."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._past: deque[tuple[float, tuple[float, ...]]] = deque()

    def update(self, now_s: float, counters: Mapping[str, float]) -> dict[str, float]:
        """Per second, by name. ``now_s``: a monotonic clock."""
        values = tuple(counters.get(name, 0.0) for name in self._names)
        self._past.append((now_s, values))
        while len(self._past) > 2 and self._past[1][0] <= now_s - _WINDOW_S:
            self._past.popleft()
        then_s, then = self._past[0]
        passed_s = now_s - then_s
        if passed_s <= 0.0:
            return dict.fromkeys(self._names, 0.0)
        return {
            name: round((value - old) / passed_s, 3) for name, value, old in zip(self._names, values, then, strict=True)
        }


class Curve:
    """Makes points of heartbeats; remembers what it saw last, to tell whether and how fast the job moves."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        """When the server that is behind told of its version, and that version."""
        self._per_s = 0.0
        self._kept: tuple[int, int] | None = None

    def point(self, time_s: float, heartbeats: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The point that the heartbeats make; None if the job has not moved since the last that was kept.

        Args:
            time_s: seconds since 1970, as in the heartbeats.
            heartbeats: of members that are there; old ones do not count.
        """
        fresh = [heartbeat for heartbeat in heartbeats if abs(time_s - heartbeat["time"]) <= FRESH_S]
        serving = [p for p in fresh if p["role"] == ProcessRole.SERVER and p["shards"] and "version" in p["metrics"]]
        workers = [heartbeat for heartbeat in fresh if heartbeat["role"] == ProcessRole.WORKER]
        if not serving:
            return None
        told_s, version = min(((p["time"], p["metrics"]["version"]) for p in serving), key=lambda pair: pair[1])
        # By the clock of who tells: between two of our looks it may have told nothing, or twice.
        if self._last is not None and told_s > self._last[0]:
            self._per_s = max(0.0, (version - self._last[1]) / (told_s - self._last[0]))
        if self._last is None or told_s > self._last[0]:
            self._last = told_s, version
        leader: Mapping[str, float] = next(
            (heartbeat["metrics"] for heartbeat in workers if 0 in heartbeat["ranks"]), {}
        )
        norms = [
            heartbeat["metrics"]["gradient_norm"] for heartbeat in serving if "gradient_norm" in heartbeat["metrics"]
        ]
        point = {
            "time": time_s,
            "version": int(version),
            "committed": int(min(heartbeat["metrics"].get("committed_version", 0) for heartbeat in serving)),
            "term": int(max(heartbeat["metrics"].get("term", 0) for heartbeat in serving)),
            "loss": leader.get("loss"),
            "learning_rate": leader.get("learning_rate"),
            "gradient_norm": norms[0] if norms else None,
            "samples_per_s": round(sum(heartbeat["rates"].get("samples", 0.0) for heartbeat in workers), 3),
            "steps_per_s": round(self._per_s, 3),
            "workers": len(workers),
            "servers": sum(heartbeat["role"] == ProcessRole.SERVER for heartbeat in fresh),
        }
        return None if self._kept == _moves(point) else point

    def kept(self, point: Mapping[str, Any]) -> None:
        """This one is on the curve."""
        self._kept = _moves(point)


def _moves(point: Mapping[str, Any]) -> tuple[int, int]:
    return point["term"], point["version"]


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON can say."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
