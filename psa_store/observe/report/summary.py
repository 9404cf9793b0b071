"""The numbers of a run, for people in words and for programs as JSON. Pure."""

from __future__ import annotations

from typing import Any

from psa_store.job.document import to_fields
from psa_store.observe.formatting import duration, model_parts
from psa_store.observe.report.failures import Failure
from psa_store.observe.report.run import Run

GOODPUT = (
    "Goodput: the time that the versions which stayed take at the normal rate, over all time in which the job was not "
    "at rest. Normal is the median of undisturbed stretches with as many workers. Versions computed again count once, "
    "those that a rollback left behind do not count; rests, in which every server had left in order, are no time."
)


def to_json(run: Run) -> dict[str, Any]:
    """Everything but the curve."""
    return {name: value for name, value in to_fields(run).items() if name not in ("points", "segments")}


def facts(run: Run) -> list[tuple[str, str]]:
    """The numbers that matter most, each with its name."""
    state = "finished" if run.finished else "not finished"
    pauses = [each.pause_s for each in run.failures if each.pause_s is not None]
    longest = f", the longest pause {duration(max(pauses))}" if pauses else ""
    times = f"{duration(run.running_s)} running, {duration(run.down_s)} down, {duration(run.rest_s)} at rest"
    speed = "unknown" if run.versions_per_s is None else f"{run.versions_per_s:.3g} versions/s, usually"
    rows = [
        ("version", f"{run.version:,} ({state})"),
        ("goodput", "unknown: the run is too short" if run.goodput is None else f"{run.goodput:.1%}"),
        ("time", times),
        ("speed", speed),
        ("samples", f"about {run.samples:,}"),
        ("loss", "unknown" if run.loss is None else f"{run.loss:.4g}, least {run.loss_min:.4g}"),
        ("failures", f"{len(run.failures)}{longest}"),
        ("computed again", f"{run.computed_again:,} versions after failures"),
        ("rollbacks", str(len(run.rollbacks))),
        ("terms", str(run.terms)),
        ("members", f"{_least_to_most(run.workers)} workers, {_least_to_most(run.servers)} servers"),
        ("checkpoints", str(len(run.checkpoints))),
    ]
    rows[6:6] = [(name, f"{value:.4g}") for name, value in sorted(run.metrics.items())]
    if parts := model_parts(run.stages, run.microbatches):
        rows.insert(0, ("model", parts))
    if run.waiting is not None and run.bubble is not None:
        own = f"with a worker for each cell, {run.bubble:.0%} are the pipeline's own"
        rows.insert(5, ("workers wait", f"{run.waiting:.0%} of their time; {own}"))
    if run.clock_back_s > 0.0:
        rows.append(("clocks", f"went back by {duration(run.clock_back_s)}: times near it are wrong"))
    return rows


def pause(failure: Failure, interval_s: float) -> str:
    """How long a failure stopped training, as exactly as it is known."""
    if failure.pause_s is None:
        return "did not go on"
    return f"< {duration(interval_s)}" if failure.pause_s < interval_s else duration(failure.pause_s)


def _least_to_most(counts: tuple[int, int]) -> str:
    least, most = counts
    return str(most) if least == most else f"{least} to {most}"
