"""A picture of the comparison: a bar for each contender, one group for each number of workers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from psa_store.bench.names import FLOOR, PSA, PSA_TCP
from psa_store.bench.report import title
from psa_store.bench.results import Comparison, Match
from psa_store.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {PSA: "#0b6e4f", PSA_TCP: "#6bbf59", FLOOR: "#c8c8c8"}
_PEER_COLOR = "#5b7db1"
_WIDTH_INCHES, _BAR_INCHES, _FRAME_INCHES = 9.0, 0.42, 1.0
_ROOM_FOR_LABELS = 1.3
_DPI = 130


def check_matplotlib() -> None:
    """Raise UsageError, before anything is measured, if there can be no picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--png needs matplotlib: pip install 'psa_store[bench]', or leave --png out")


def draw(comparison: Comparison, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [_FRAME_INCHES + _BAR_INCHES * len(match.contenders) for match in comparison.matches]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(comparison.matches), 1, squeeze=False, height_ratios=heights)
    for axis, match in zip(axes[:, 0], comparison.matches, strict=True):
        _draw_match(axis, match)
    figure.savefig(path, dpi=_DPI, format="png")


def _draw_match(axis: Axes, match: Match) -> None:
    times_ms = [1e3 * each.median_s for each in match.contenders]
    spreads = [each.quartiles_s for each in match.contenders]
    errors_ms = [
        [1e3 * (spread.median - spread.low) for spread in spreads],
        [1e3 * (spread.high - spread.median) for spread in spreads],
    ]
    places = range(len(match.contenders))
    axis.barh(
        places,
        times_ms,
        xerr=errors_ms,
        color=[_COLORS.get(each.name, _PEER_COLOR) for each in match.contenders],
        error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 3},
    )
    for place, each, spread in zip(places, match.contenders, spreads, strict=True):
        ratio = "" if each is match.base else f"   {match.base.name} / it = {match.ratio(match.base, each).median:.2f}"
        axis.annotate(
            f"{1e3 * each.median_s:.3g} ms{ratio}",
            (1e3 * spread.high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.set_yticks(places, [each.name for each in match.contenders])
    axis.invert_yaxis()
    axis.set_xlim(0, _ROOM_FOR_LABELS * max(1e3 * spread.high for spread in spreads))
    axis.set_xlabel("ms per step: push, reduction, update, pull (median and quartiles)", fontsize=9)
    axis.set_title(title(match.workload), loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
