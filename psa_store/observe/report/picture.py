"""The picture of a run: loss, throughput, members and versions over one time, with what failed and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from statistics import median
from typing import TYPE_CHECKING

from psa_store.observe.curve import Point
from psa_store.observe.formatting import count, duration
from psa_store.observe.report.run import Run
from psa_store.observe.report.summary import pause
from psa_store.observe.report.time_axis import TimeAxis
from psa_store.observe.report.timeline import State, gap_after_s

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PALE, _REST, _DOWN = "#222222", "#b9c4d0", "#e9ecf0", "#f6cfc4"
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072b2", "#e69f00", "#009e73", "#c0392b", "#8e44ad"
_SIZE_INCHES, _DPI = (12.0, 10.0), 100
_SMOOTH = 15
"""Losses whose running median is drawn, where there are a few times as many."""
_DECADE = 10.0
_LANES = 3
_MANY_MARKS = 40
"""Their lines are thin, or they would hide what they mark."""
_CHARACTER = 0.0066
"""Width of a character of a label, as a share of the picture's width."""


@dataclass(frozen=True, slots=True)
class _Mark:
    place: float
    label: str
    color: str


def draw(run: Run) -> bytes:
    """The picture as PNG, 1200 by 1000 pixels. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    strip, loss, speed, members, versions = figure.subplots(5, 1, sharex=True, height_ratios=[1.0, 3.2, 2.2, 1.6, 2.2])
    time_axis = TimeAxis(run.segments, run.begin)
    span = time_axis.length or 1.0
    marks = _marks(run, time_axis)
    width, alpha = (0.9, 0.75) if len(marks) <= _MANY_MARKS else (0.5, 0.4)
    _labels(strip, marks, span)
    _name_rests(strip, run, time_axis, span)
    for panel in (strip, loss, speed, members, versions):
        _states(panel, run, time_axis)
        panel.spines[["top", "right"]].set_visible(False)
        for mark in marks:
            panel.axvline(mark.place, color=mark.color, linewidth=width, alpha=alpha, zorder=1.5)
    _loss(loss, run, time_axis)
    _speed(speed, run, time_axis)
    _members(members, run, time_axis)
    _versions(versions, run, time_axis)
    versions.set_xlim(-0.005 * span, 1.005 * span)
    ticks = time_axis.ticks()
    versions.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    rests = " (rests are shortened, and not counted)" if run.rest_s else ""
    versions.set_xlabel(f"{time_axis.unit}{rests}")
    figure.align_ylabels([loss, speed, members, versions])
    goodput = "" if run.goodput is None else f", goodput {run.goodput:.1%}"
    failures = count(len(run.failures), "failure") if run.failures else "no failure"
    figure.suptitle(f"{run.job}: version {run.version:,}, {failures}{goodput}", fontsize=13, parse_math=False)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _marks(run: Run, time_axis: TimeAxis) -> list[_Mark]:
    marks = [
        _Mark(time_axis.place(each.time), f"{number} {each.what}, {pause(each, run.interval_s)}", _RED)
        for number, each in enumerate(run.failures, 1)
    ]
    marks += [_Mark(time_axis.place(each.time), f"back to {each.version:,}", _PURPLE) for each in run.rollbacks]
    return sorted(marks, key=lambda mark: mark.place)


def _labels(axes: Axes, marks: Sequence[_Mark], span: float) -> None:
    """As many whole labels as there is room for, else their numbers alone, else nothing: the page lists all."""
    axes.set_ylim(_LANES + 1, 0)  # the lowest lane is that of rests
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False)
    for shorten in (str, lambda label: label.partition(" ")[0]):
        lanes = _lanes([mark.place / span for mark in marks], [shorten(mark.label) for mark in marks])
        if all(lane is not None for lane in lanes):
            break
    for mark, lane in zip(marks, lanes, strict=True):
        if lane is not None:
            text = shorten(mark.label)
            left = mark.place / span + _CHARACTER * (len(text) + 1) <= 1.0
            axes.annotate(
                text,
                (mark.place, lane + 0.5),
                xytext=(3 if left else -3, 0),
                textcoords="offset points",
                ha="left" if left else "right",
                va="center",
                fontsize=8.5,
                color=mark.color,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )


def _lanes(places: Sequence[float], texts: Sequence[str]) -> list[int | None]:
    """For each label, the first lane where it does not touch another; places are shares of the width, ascending."""
    ends = [-1.0] * _LANES
    lanes: list[int | None] = []
    for place, text in zip(places, texts, strict=True):
        width = _CHARACTER * (len(text) + 1)
        begin = place if place + width <= 1.0 else place - width
        free = next((lane for lane, end in enumerate(ends) if end <= begin), None)
        if free is not None:
            ends[free] = begin + width
        lanes.append(free)
    return lanes


def _states(axes: Axes, run: Run, time_axis: TimeAxis) -> None:
    for each in run.segments:
        if each.state is not State.RUNNING:
            color = _REST if each.state is State.REST else _DOWN
            axes.axvspan(time_axis.place(each.begin_s), time_axis.place(each.end_s), color=color, linewidth=0, zorder=0)


def _name_rests(axes: Axes, run: Run, time_axis: TimeAxis, span: float) -> None:
    """Below the labels, as many as there is room for."""
    end = -1.0
    for each in run.segments:
        text = f"rest {duration(each.length_s)}"
        middle = (time_axis.place(each.begin_s) + time_axis.place(each.end_s)) / 2
        half = _CHARACTER * (len(text) + 1) / 2
        if each.state is State.REST and middle / span - half >= end:
            axes.text(middle, _LANES + 0.5, text, ha="center", va="center", fontsize=8)
            end = middle / span + half


def _line(run: Run, time_axis: TimeAxis, value: Callable[[Point], float | None]) -> tuple[list[float], list[float]]:
    """Places and values; a line of them is broken where there are no points for long."""
    gap_s = gap_after_s(run.points)
    places: list[float] = []
    values: list[float] = []
    for index, point in enumerate(run.points):
        if index and point.time - run.points[index - 1].time > gap_s:
            places.append(places[-1])
            values.append(math.nan)
        found = value(point)
        places.append(time_axis.place(point.time))
        values.append(math.nan if found is None else found)
    return places, values


def _marker(values: Sequence[float]) -> str:
    """A single value is a dot, for a line of it would not be seen."""
    return "o" if sum(not math.isnan(each) for each in values) == 1 else ""


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _loss(axes: Axes, run: Run, time_axis: TimeAxis) -> None:
    axes.set_ylabel("loss of rank 0")
    places, values = _line(run, time_axis, lambda point: point.loss)
    losses = [each for each in values if not math.isnan(each)]
    if not losses:
        axes.text(0.5, 0.5, "the script gives no loss: worker.step(loss)", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
        return
    smooth = len(losses) > 4 * _SMOOTH
    axes.plot(places, values, color=_PALE if smooth else _INK, linewidth=0.8 if smooth else 1.2, marker=_marker(values))
    if smooth:
        axes.plot(places, _smoothed(values), color=_INK, linewidth=1.4)
    if min(losses) > 0.0 and max(losses) / min(losses) >= _DECADE:
        axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.25)


def _smoothed(values: Sequence[float]) -> list[float]:
    """The running median of those that are there; where none is, none."""
    half = _SMOOTH // 2
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [
        math.nan if math.isnan(value) else median(each for each in window if not math.isnan(each))
        for value, window in zip(values, windows, strict=True)
    ]


def _speed(axes: Axes, run: Run, time_axis: TimeAxis) -> None:
    places, values = _line(run, time_axis, lambda point: point.samples_per_s)
    axes.plot(places, values, color=_BLUE, linewidth=1.0, marker=_marker(values))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("samples/s", color=_BLUE)
    axes.grid(axis="y", alpha=0.25)
    lag = axes.twinx()
    places, values = _line(run, time_axis, lambda point: max(0, point.version - point.committed))
    lag.plot(places, values, color=_ORANGE, linewidth=0.7, alpha=0.9, marker=_marker(values))
    lag.set_ylim(0, 2.2 * max((each for each in values if not math.isnan(each)), default=0.0) or 1.0)
    _whole_numbers(lag)
    lag.set_ylabel("versions not durable yet", color=_ORANGE)
    lag.spines["top"].set_visible(False)


def _members(axes: Axes, run: Run, time_axis: TimeAxis) -> None:
    most = 1.0
    for name, color, value in (
        ("workers", _GREEN, lambda point: point.workers),
        ("servers", _PURPLE, lambda point: point.servers),
    ):
        places, values = _line(run, time_axis, value)
        axes.plot(
            places, values, color=color, linewidth=1.5, drawstyle="steps-post", label=name, marker=_marker(values)
        )
        most = max([most, *(each for each in values if not math.isnan(each))])
    axes.set_ylim(0, most + 1)
    _whole_numbers(axes)
    axes.set_ylabel("members")
    axes.legend(loc="upper right", ncols=2, fontsize=8, frameon=False, borderaxespad=0.1)
    axes.grid(axis="y", alpha=0.25)


def _versions(axes: Axes, run: Run, time_axis: TimeAxis) -> None:
    places, values = _line(run, time_axis, lambda point: point.version)
    axes.plot(places, values, color=_INK, linewidth=1.2, marker=_marker(values))
    kept = [(time_axis.place(each.time), each.version) for each in run.checkpoints]
    if kept:
        axes.plot(
            [place for place, _ in kept],
            [version for _, version in kept],
            linestyle="none",
            marker="D",
            markersize=5,
            color=_GREEN,
            markeredgecolor="white",
            label="checkpoint",
            zorder=3,
        )
        axes.legend(loc="upper left", fontsize=8, frameon=False)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("version")
    axes.grid(axis="y", alpha=0.25)
