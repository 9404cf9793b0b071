"""What a pulse says, and the point of the curve that all pulses together make. Pure, but for this process's memory."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_store.telemetry import Role

_WINDOW_S = 5.0
FRESH_S = 5.0
"""A pulse that is older than this says nothing of the present."""


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
    """Makes points of pulses; remembers what it saw last, to tell whether and how fast the job moves."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        """When the server that is behind told of its version, and that version."""
        self._per_s = 0.0
        self._kept: tuple[int, int] | None = None

    def point(self, time_s: float, pulses: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The point that the pulses make; None if the job has not moved since the last that was kept.

        Args:
            time_s: seconds since 1970, as in the pulses.
            pulses: of members that are there; old ones do not count.
        """
        fresh = [pulse for pulse in pulses if abs(time_s - pulse["time"]) <= FRESH_S]
        serving = [p for p in fresh if p["role"] == Role.SERVER and p["shards"] and "version" in p["vitals"]]
        workers = [pulse for pulse in fresh if pulse["role"] == Role.WORKER]
        if not serving:
            return None
        told_s, version = min(((p["time"], p["vitals"]["version"]) for p in serving), key=lambda pair: pair[1])
        # By the clock of who tells: between two of our looks it may have told nothing, or twice.
        if self._last is not None and told_s > self._last[0]:
            self._per_s = max(0.0, (version - self._last[1]) / (told_s - self._last[0]))
        if self._last is None or told_s > self._last[0]:
            self._last = told_s, version
        leader: Mapping[str, float] = next((pulse["vitals"] for pulse in workers if 0 in pulse["ranks"]), {})
        norms = [pulse["vitals"]["gradient_norm"] for pulse in serving if "gradient_norm" in pulse["vitals"]]
        point = {
            "time": time_s,
            "version": int(version),
            "committed": int(min(pulse["vitals"].get("committed_version", 0) for pulse in serving)),
            "epoch": int(max(pulse["vitals"].get("epoch", 0) for pulse in serving)),
            "loss": leader.get("loss"),
            "learning_rate": leader.get("learning_rate"),
            "gradient_norm": norms[0] if norms else None,
            "samples_per_s": round(sum(pulse["rates"].get("samples", 0.0) for pulse in workers), 3),
            "steps_per_s": round(self._per_s, 3),
            "workers": len(workers),
            "servers": sum(pulse["role"] == Role.SERVER for pulse in fresh),
        }
        return None if self._kept == _moves(point) else point

    def kept(self, point: Mapping[str, Any]) -> None:
        """This one is on the curve."""
        self._kept = _moves(point)


def _moves(point: Mapping[str, Any]) -> tuple[int, int]:
    return point["epoch"], point["version"]


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON can say."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
