"""A run, put together from the curve, the events and the checkpoints of a job. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import ClassVar

from psa_store.checkpoint.catalog import Checkpoint
from psa_store.job.config import JobConfig
from psa_store.job.document import ADDED_LATER
from psa_store.observe.curve import Point
from psa_store.observe.events import Event, EventKind
from psa_store.observe.report.failures import Failure, find_failures, with_pause
from psa_store.observe.report.timeline import (
    Moment,
    Rates,
    Segment,
    State,
    forward,
    gap_after_s,
    interval_s,
    kept_versions,
    moments,
    segments,
)

_STANDINGS = (EventKind.TERM, EventKind.RECOVERED, EventKind.HAND_OVER, EventKind.ROLLBACK, EventKind.FINISHED)


@dataclass(frozen=True, slots=True)
class Rollback:
    """A rollback that was commanded."""

    time: float
    version: int
    lost: int
    """Versions that it had made beyond, as far as the curve shows."""
    text: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that is there."""

    time: float
    name: str
    version: int
    reason: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """All invocations of one job, as far back as its history goes: what the page, the picture and the JSON of
    `psa report` show. Times are seconds since 1970."""

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
    """See :func:`describe_run`; None if the job was never undisturbed for two points."""
    versions_per_s: float | None
    """Where nothing disturbed the job, whatever number of workers it had."""
    version: int
    """Where it is now."""
    samples: int
    """About so many: the sum of what the points say per second."""
    loss: float | None
    loss_min: float | None
    metrics: Mapping[str, float]
    """Of the script, the newest that are known."""
    terms: int
    workers: tuple[int, int]
    """The least and the most that there were, when there were some."""
    servers: tuple[int, int]
    committed: int
    computed_again: int
    """Versions, after failures."""
    interval_s: float
    """Between two points as a rule: how exactly pauses are known."""
    clock_back_s: float
    """By how much the clocks of controllers have gone back, all in all; those times are not to be trusted."""
    failures: tuple[Failure, ...]
    rollbacks: tuple[Rollback, ...]
    checkpoints: tuple[Kept, ...]
    points: tuple[Point, ...]
    segments: tuple[Segment, ...]
    stages: int = field(default=1, metadata=ADDED_LATER)
    """Of the model ..."""
    microbatches: int = field(default=1, metadata=ADDED_LATER)
    """... and the parts in which a rank's batch goes through them."""
    waiting: float | None = field(default=None, metadata=ADDED_LATER)
    """Of a model in stages: the share of their time that workers waited, the mean over the curve ..."""
    bubble: float | None = field(default=None, metadata=ADDED_LATER)
    """... and what of it is the pipeline's own, with a worker for each cell."""


def describe_run(
    job: str,
    points: Iterable[Point],
    events: Iterable[Event],
    checkpoints: Iterable[Checkpoint],
    config: JobConfig | None = None,
) -> Run:
    """Put a run together. Points and events are whole and in order, as JobHistory gives them.

    Goodput is useful time over time, from the first to the last that is known:

    - Useful is what the versions that stayed would have taken at the normal rate. It is the median over all stretches
      between two points in which nothing happened and as many workers were there; so a job that has fewer workers for
      a long time is a smaller job, not a worse one. Versions that were computed again count once, those that a rollback
      left behind do not count.
    - Time is all time but rests, in which every server had left in order and the job was not run. A job all of whose
      processes died is down until it is run again.

    A job that was faster at times than its normal rate has no more than 1.
    """
    known, back_s = forward(points)
    happened = sorted(events, key=lambda each: each.time)  # several servers write, each when it comes to it
    gap_s = gap_after_s(known)
    timeline = moments(known, happened)
    rates = Rates(known, happened, gap_s)
    parts = segments(timeline, happened, rates, gap_s)
    failures = tuple(with_pause(each, timeline, parts, rates) for each in find_failures(happened))
    waited = [each.waiting for each in known if each.waiting is not None]
    losses = [each.loss for each in known if each.loss is not None]
    times = [parts[0].begin_s, parts[-1].end_s] if parts else [each.time for each in known]
    return Run(
        job=job,
        finished=[each.kind for each in happened if each.kind in _STANDINGS][-1:] == [EventKind.FINISHED],
        begin=times[0] if times else None,
        end=times[-1] if times else None,
        running_s=_length_s(parts, State.RUNNING),
        down_s=_length_s(parts, State.DOWN),
        rest_s=_length_s(parts, State.REST),
        goodput=_goodput(timeline, parts, rates),
        versions_per_s=rates.usual,
        version=timeline[-1].version if timeline else 0,
        samples=round(sum(b.samples_per_s * min(b.time - a.time, gap_s) for a, b in pairwise(known))),
        loss=losses[-1] if losses else None,
        loss_min=min(losses, default=None),
        metrics=next((each.metrics for each in reversed(known) if each.metrics), {}),
        terms=len({each.term for each in known}),
        workers=_range([each.workers for each in known if each.workers]),
        servers=_range([each.servers for each in known if each.servers]),
        committed=known[-1].committed if known else 0,
        computed_again=sum(each.computed_again for each in failures),
        interval_s=interval_s(known),
        clock_back_s=back_s,
        failures=failures,
        rollbacks=tuple(_rollbacks(happened, known)),
        checkpoints=tuple(
            Kept(each.created_s, each.name, each.version, each.reason.value, each.bytes) for each in checkpoints
        ),
        points=known,
        segments=parts,
        stages=config.stages if config else 1,
        microbatches=config.microbatches if config else 1,
        waiting=fmean(waited) if waited else None,
        bubble=config.bubble if config and config.stages > 1 else None,
    )


def _length_s(parts: Iterable[Segment], state: State) -> float:
    return sum(each.length_s for each in parts if each.state is state)


def _range(counts: Sequence[int]) -> tuple[int, int]:
    return min(counts, default=0), max(counts, default=0)


def _goodput(timeline: Sequence[Moment], parts: Iterable[Segment], rates: Rates) -> float | None:
    wall_s = sum(each.length_s for each in parts if each.state is not State.REST)
    useful_s = 0.0
    for (_, b), kept in zip(pairwise(timeline), kept_versions(timeline), strict=True):
        rate = rates.of(b.workers)
        if rate is None:
            return None
        useful_s += kept / rate
    return min(1.0, useful_s / wall_s) if wall_s > 0.0 else None


def _rollbacks(events: Iterable[Event], points: Sequence[Point]) -> Iterable[Rollback]:
    for event in events:
        if event.kind is EventKind.ROLLBACK and event.version is not None:
            before = [each.version for each in points if each.time <= event.time]
            lost = max(0, before[-1] - event.version) if before else 0
            yield Rollback(event.time, event.version, lost, event.text)
