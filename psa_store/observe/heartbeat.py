"""What a process publishes about itself once a second. Pure, but for this process's memory."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from psa_store.cluster import Cell, ProcessRole
from psa_store.job.document import ADDED_LATER
from psa_store.logs import Wait

_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class Reported:
    """What the script said with the newest step of one rank: numbers of its own, by name, and how much they count."""

    weight: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The newest heartbeat of one member. Redis keeps it until the member leaves, so it may be old: see ``time``."""

    FORMAT: ClassVar[int] = 1

    member: str
    role: ProcessRole
    time: float
    """When it was written, in seconds since 1970, by the clock of its host."""
    host: str = ""
    pid: int = 0
    endpoint: str = ""
    """``host:port`` where it answers over HTTP; empty if it does not."""
    resident_bytes: int | None = None
    """Its memory that is in RAM; None where that is unknown."""
    stage: str = ""
    shards: int = 0
    """That a server owns."""
    ranks: tuple[int, ...] = ()
    """That the plan gives to a worker."""
    stages: int = field(default=1, metadata=ADDED_LATER)
    """Of the model."""
    cells: tuple[Cell, ...] = field(default=(), metadata=ADDED_LATER)
    """Which stages of its ranks a worker computes, where there are several."""
    waits_for: tuple[Cell, ...] = field(default=(), metadata=ADDED_LATER)
    """Cells of other workers of which something must arrive before it can go on with its step ..."""
    waits_s: float | None = field(default=None, metadata=ADDED_LATER)
    """... and for how long it has waited."""
    held_up: Wait | None = field(default=None, metadata=ADDED_LATER)
    """What it waits for longer than is usual, with the cause if that is known."""
    steps_per_s: float | None = None
    """Of a worker, over the last few seconds; all of its ranks count."""
    samples_per_s: float | None = None
    reported: Mapping[int, Reported] = field(default_factory=dict)
    """By rank that a worker computes, where its script gives metrics to ``worker.step()``."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers by the names of :data:`psa_store.observe.metrics.METRICS`; those that are not known are absent."""

    def has_loss_of(self, rank: int) -> bool:
        """Whether this worker computes what a rank's loss comes from: its last stage."""
        return rank in self.ranks if self.stages == 1 else Cell(rank, self.stages - 1) in self.cells

    def whole(self, metric: str) -> int | None:
        """A metric that counts; None if it is not known."""
        value = self.metrics.get(metric)
        return None if value is None else int(value)


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


def mean_reported(heartbeats: Iterable[Heartbeat]) -> dict[str, float]:
    """What scripts reported, by name: the weighted mean over ranks, as their gradients are averaged."""
    ranks = {rank: said for each in heartbeats for rank, said in each.reported.items() if each.has_loss_of(rank)}
    sums: dict[str, tuple[float, float]] = {}
    for _, said in sorted(ranks.items()):
        for name, value in said.metrics.items():
            total, weight = sums.get(name, (0.0, 0.0))
            sums[name] = total + said.weight * value, weight + said.weight
    return {name: total / weight for name, (total, weight) in sums.items() if weight > 0.0}


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON can say."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None where the system does not show it."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else None
