"""What was measured, and what follows from it: medians, quartiles, ratios, rates. Pure.

A ratio is one of medians; its spread is that of the ratios within each round, which a slow spell of the machine that
lasts longer than a round leaves alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from psa_store.bench.names import STREAM, STREAM_BOTH_WAYS
from psa_store.bench.workload import Workload


@dataclass(frozen=True, slots=True)
class Quartiles:
    """The middle of some figures, and the range in which half of them lie."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    """Seconds per step of one contender, one figure for each round."""

    name: str
    blocks_s: tuple[float, ...]

    @property
    def quartiles_s(self) -> Quartiles:
        return quartiles(self.blocks_s)

    @property
    def median_s(self) -> float:
        return statistics.median(self.blocks_s)


@dataclass(frozen=True, slots=True)
class Match:
    """All that was measured side by side with one number of workers. The first contender is what others are held
    against."""

    workload: Workload
    contenders: tuple[Series, ...]
    limits: tuple[Series, ...]

    @property
    def base(self) -> Series:
        return self.contenders[0]

    def find(self, name: str) -> Series | None:
        """A contender or limit, if it took part."""
        return next((each for each in (*self.contenders, *self.limits) if each.name == name), None)

    def ratio(self, above: Series, below: Series) -> Quartiles:
        """How much longer a step of ``above`` takes."""
        by_round = quartiles([a / b for a, b in zip(above.blocks_s, below.blocks_s, strict=True)])
        return Quartiles(above.median_s / below.median_s, by_round.low, by_round.high)

    def rate(self, limit: Series) -> Quartiles:
        """Bytes per second that a limit stands for; both directions count."""
        moved_bytes = self.workload.size_bytes * (2 if limit.name == STREAM_BOTH_WAYS else 1)
        found = limit.quartiles_s
        return Quartiles(moved_bytes / found.median, moved_bytes / found.high, moved_bytes / found.low)

    def share_of_stream(self, contender: Series) -> float | None:
        """Bytes per second that a contender moves, gradients one way and parameters the other, as a share of what the
        raw stream moved beside it; None if that was not measured."""
        stream = self.find(STREAM)
        return moved_per_s(self.workload, contender) / self.rate(stream).median if stream else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run of the benchmark. ``absent``: why a contender did not take part."""

    matches: tuple[Match, ...]
    absent: Mapping[str, str]
    steps: int
    """Timed steps in a block."""


def moved_per_s(workload: Workload, contender: Series) -> float:
    """Bytes per second that workers push and pull in a step."""
    return 2 * workload.workers * workload.size_bytes / contender.median_s


def quartiles(values: tuple[float, ...] | list[float]) -> Quartiles:
    """Of one figure it is the figure itself."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, low, high)
