"""What a further worker costs: a line through the time per step over the number of workers, and whether it bends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from psa_store.bench.results import Comparison, Match, Series, quartiles

POINTS_MIN = 3
_RESAMPLES = 2000
_INTERVAL_PERCENT = (5, 95)
_NEGLIGIBLE = 0.01
"""Of the slope: a bend that small is a matter of rounding."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Of one contender. The second difference is that of the parabola through the medians; its interval holds 90% of
    the second differences that the spread between blocks makes plausible."""

    name: str
    points: tuple[tuple[int, float], ...]
    """Number of workers, seconds per step."""
    slope_s: float
    """Least squares, seconds per added worker."""
    bend_s: float
    """Second difference, seconds per added worker and added worker."""
    bend_low_s: float
    bend_high_s: float

    @property
    def bends_up(self) -> bool:
        """Whether there is a quadratic term that the spread between blocks does not explain, and that matters."""
        return self.bend_low_s > _NEGLIGIBLE * abs(self.slope_s)


def curves(comparison: Comparison) -> list[Curve]:
    """A curve for each contender, if enough numbers of workers were measured."""
    matches = sorted(comparison.matches, key=lambda match: match.workload.workers)
    if len(matches) < POINTS_MIN:
        return []
    return [_curve(each.name, matches) for each in matches[0].contenders]


def _curve(name: str, matches: Sequence[Match]) -> Curve:
    workers = [match.workload.workers for match in matches]
    series = [each for match in matches if (each := match.find(name)) is not None]
    medians = [each.median_s for each in series]
    rng = np.random.default_rng(0)
    bends = [_bend(workers, [_resampled_median(each, rng) for each in series]) for _ in range(_RESAMPLES)]
    low, high = np.percentile(bends, _INTERVAL_PERCENT)
    return Curve(
        name=name,
        points=tuple(zip(workers, medians, strict=True)),
        slope_s=float(np.polyfit(workers, medians, 1)[0]),
        bend_s=_bend(workers, medians),
        bend_low_s=float(low),
        bend_high_s=float(high),
    )


def _bend(workers: Sequence[int], times_s: Sequence[float]) -> float:
    return 2 * float(np.polyfit(workers, times_s, 2)[0])


def _resampled_median(series: Series, rng: np.random.Generator) -> float:
    return quartiles(rng.choice(series.blocks_s, len(series.blocks_s)).tolist()).median
