"""The numbers of a run, for people in words and for programs as JSON. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from psa_store.observe.formatting import duration
from psa_store.observe.report.failures import Failure
from psa_store.observe.report.run import Kept, Rollback, Run
from psa_store.observe.report.timeline import State

GOODPUT = (
    "Goodput: the time that the versions which stayed take at the normal rate, over all time in which the job was not "
    "at rest. Normal is the median of undisturbed stretches with as many workers. Versions computed again count once, "
    "those that a rollback left behind do not count; rests, in which every server had left in order, are no time."
)


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything of a run but its curve: the JSON of `psa report`. Times are seconds since 1970."""

    FORMAT: ClassVar[int] = 1

    job: str
    finished: bool
    begin: float | None
    """None, like ``end``, if nothing is known of it."""
    end: float | None
    running_s: float
    down_s: float
    rest_s: float
    goodput: float | None
    versions_per_s: float | None
    version: int
    samples: int
    loss: float | None
    loss_min: float | None
    terms: int
    workers: tuple[int, int]
    """The least and the most that there were, when there were some."""
    servers: tuple[int, int]
    committed: int
    computed_again: int
    interval_s: float
    clock_back_s: float
    failures: tuple[Failure, ...]
    rollbacks: tuple[Rollback, ...]
    checkpoints: tuple[Kept, ...]


def summary(run: Run) -> Summary:
    losses = [each.loss for each in run.points if each.loss is not None]
    return Summary(
        job=run.job,
        finished=run.finished,
        begin=run.begin_s,
        end=run.end_s,
        running_s=run.time_s(State.RUNNING),
        down_s=run.time_s(State.DOWN),
        rest_s=run.time_s(State.REST),
        goodput=run.goodput,
        versions_per_s=run.rate,
        version=run.version,
        samples=round(run.samples),
        loss=losses[-1] if losses else None,
        loss_min=min(losses, default=None),
        terms=run.terms,
        workers=_range([each.workers for each in run.points if each.workers]),
        servers=_range([each.servers for each in run.points if each.servers]),
        committed=run.points[-1].committed if run.points else 0,
        computed_again=run.computed_again,
        interval_s=run.interval_s,
        clock_back_s=run.clock_back_s,
        failures=run.failures,
        rollbacks=run.rollbacks,
        checkpoints=run.checkpoints,
    )


def facts(found: Summary) -> list[tuple[str, str]]:
    """The numbers that matter most, each with its name."""
    state = "finished" if found.finished else "not finished"
    pauses = [each.pause_s for each in found.failures if each.pause_s is not None]
    longest = f", the longest pause {duration(max(pauses))}" if pauses else ""
    times = f"{duration(found.running_s)} running, {duration(found.down_s)} down, {duration(found.rest_s)} at rest"
    speed = "unknown" if found.versions_per_s is None else f"{found.versions_per_s:.3g} versions/s, usually"
    rows = [
        ("version", f"{found.version:,} ({state})"),
        ("goodput", "unknown: the run is too short" if found.goodput is None else f"{found.goodput:.1%}"),
        ("time", times),
        ("speed", speed),
        ("samples", f"about {found.samples:,}"),
        ("loss", "unknown" if found.loss is None else f"{found.loss:.4g}, least {found.loss_min:.4g}"),
        ("failures", f"{len(found.failures)}{longest}"),
        ("computed again", f"{found.computed_again:,} versions after failures"),
        ("rollbacks", str(len(found.rollbacks))),
        ("terms", str(found.terms)),
        ("members", f"{_least_to_most(found.workers)} workers, {_least_to_most(found.servers)} servers"),
        ("checkpoints", str(len(found.checkpoints))),
    ]
    if found.clock_back_s > 0.0:
        rows.append(("clocks", f"went back by {duration(found.clock_back_s)}: times near it are wrong"))
    return rows


def pause(failure: Failure, interval_s: float) -> str:
    """How long a failure stopped training, as exactly as it is known."""
    if failure.pause_s is None:
        return "did not go on"
    return f"< {duration(interval_s)}" if failure.pause_s < interval_s else duration(failure.pause_s)


def _range(counts: list[int]) -> tuple[int, int]:
    return min(counts, default=0), max(counts, default=0)


def _least_to_most(counts: tuple[int, int]) -> str:
    least, most = counts
    return str(most) if least == most else f"{least} to {most}"
