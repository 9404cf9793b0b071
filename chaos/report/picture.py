"""The picture of a run: loss and versions over time, with every fault and what it cost."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from chaos.check.recovery import Recovery, steps_of
from chaos.history import History
from chaos.report.run import Run

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of how to draw
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Patch

_PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#8c564b",
    "#bcbd22",
    "#6a3d9a",
)
"""Okabe and Ito's colours, which people with any colour vision tell apart, and a few more."""
_MANY = tuple(to_hex(plt.get_cmap("tab20")(index)) for index in range(20))
_LABELS_MAX = 14
"""With more faults than this their names go to the legend alone."""
_BUCKETS = 40
_WINDOW = 25
_WINDOWS = 150
"""The line of the loss is a running median: of so many losses, or of this share of all of them."""


def draw(run: Run, path: Path) -> None:
    """Draw one run."""
    assert run.history is not None
    history = run.history
    kinds = sorted({each.kind for each in run.verdict.recoveries})
    palette = _PALETTE if len(kinds) <= len(_PALETTE) else _MANY
    colours = {kind: palette[index % len(palette)] for index, kind in enumerate(kinds)}
    figure, (top, strip, middle, bottom) = plt.subplots(
        4, 1, figsize=(13, 10), sharex=True, height_ratios=[4, 1.6, 2.2, 1.4], layout="constrained"
    )
    steps = steps_of(history)
    begun = steps.times[0]
    _loss(top, history, begun)
    for recovery in run.verdict.recoveries:
        _fault(top, recovery, colours, labelled=len(run.verdict.recoveries) <= _LABELS_MAX)
        middle.axvspan(recovery.at_s, recovery.at_s + recovery.recovery_s, color=colours[recovery.kind], alpha=0.25)
    _quiet(top, history, begun)
    _strip(strip, run.verdict.recoveries, colours)
    middle.plot([t - begun for t in steps.times], steps.versions, color="#333333", linewidth=1)
    middle.set_ylabel("version")
    _goodput(bottom, steps.times, steps.versions, begun, steps.normal_s)
    bottom.set_xlabel("seconds since the first step")
    if len(kinds) > 1 or len(run.verdict.recoveries) > _LABELS_MAX:
        counts = {kind: sum(each.kind == kind for each in run.verdict.recoveries) for kind in kinds}
        handles = [Patch(color=colours[kind], label=f"{kind} ({counts[kind]})") for kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    promises = "A and B hold" if not run.verdict.violations else f"{len(run.verdict.violations)} violations"
    figure.suptitle(
        f"{run.name}, seed {run.seed}: {len(run.verdict.recoveries)} faults, {promises}, "
        f"goodput {run.verdict.goodput:.0%}, normal step {1000 * run.verdict.normal_step_s:.1f} ms"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _loss(axes: Axes, history: History, begun: float) -> None:
    points = [(event.t - begun, event["loss"]) for event in history.of("loss") if event["rank"] == 0]
    if not points:
        return
    times, losses = (np.array(each) for each in zip(*points, strict=True))
    axes.plot(times, losses, color="#cccccc", linewidth=0.4, zorder=1, label="loss of rank 0")
    window = max(_WINDOW, len(losses) // _WINDOWS)
    if len(losses) > 2 * window:
        windows = np.lib.stride_tricks.sliding_window_view(losses, window)[:: max(1, window // _WINDOW)]
        middles = times[window // 2 :: max(1, window // _WINDOW)][: len(windows)]
        axes.plot(middles, np.median(windows, axis=1), color="#111111", linewidth=1.4)
    if losses.min() > 0:
        axes.set_yscale("log")
    axes.set_ylabel("loss of rank 0")


def _fault(axes: Axes, recovery: Recovery, colours: dict[str, str], *, labelled: bool) -> None:
    colour = colours[recovery.kind]
    # Hundreds of faults would hide the loss: they are thin then, and behind it.
    width, alpha = (1.1, 0.9) if labelled else (0.6, 0.45)
    axes.axvline(recovery.at_s, color=colour, linewidth=width, alpha=alpha, zorder=1.5)
    if recovery.recovery_s:
        axes.axvspan(recovery.at_s, recovery.at_s + recovery.recovery_s, color=colour, alpha=0.25, zorder=1.4)
    if labelled:
        text = f"{recovery.kind} {recovery.recovery_s:.2f} s" if recovery.recovery_s else f"{recovery.kind}, no pause"
        place = axes.get_xaxis_transform()
        axes.text(recovery.at_s, 0.98, f" {text}", rotation=90, va="top", fontsize=8, color=colour, transform=place)


def _strip(axes: Axes, recoveries: tuple[Recovery, ...], colours: dict[str, str]) -> None:
    """Each fault at the height of its recovery, so that a row of many stays readable."""
    for recovery in recoveries:
        axes.plot(
            [recovery.at_s] * 2, [0, recovery.recovery_s], color=colours[recovery.kind], linewidth=1.6, marker="."
        )
    axes.set_ylabel("recovery, s")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)


def _quiet(axes: Axes, history: History, begun: float) -> None:
    quiet = history.of("quiet")
    if quiet:
        end = max(event.t for event in history.events) - begun
        axes.axvspan(quiet[0].t - begun, end, color="#f0f0f0", zorder=0)
        axes.text(quiet[0].t - begun, 0.02, " quiet", fontsize=8, color="#777777", transform=axes.get_xaxis_transform())


def _goodput(axes: Axes, times: object, versions: object, begun: float, normal_s: float) -> None:
    """Useful steps per bucket of time, at their normal length: a version counts when it is reached the first time."""
    at = np.asarray(times) - begun
    reached = np.maximum.accumulate(np.asarray(versions))
    fresh = np.diff(reached, prepend=reached[0] - 1)
    edges = np.linspace(0, at[-1], min(_BUCKETS, max(2, int(at[-1]))) + 1)
    useful, _ = np.histogram(at, edges, weights=fresh)
    share = np.minimum(100 * useful * normal_s / np.diff(edges), 100)
    axes.stairs(share, edges, fill=True, color="#009e73", alpha=0.5)
    axes.set_ylim(0, 105)
    axes.set_ylabel("goodput, %")
