"""Where the Trainer's loops are, as counters of theirs say; the job decides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """Steps that have begun and steps that are done, over all epochs; ``handled``: those whose hooks are through."""

    begun: int
    done: int
    handled: int
    epoch: int
    epoch_steps: int


def before(version: int, epoch_steps: int) -> Place:
    """Between two iterations: the next one makes what comes after ``version``."""
    return Place(version, version, version, version // epoch_steps, epoch_steps)


def within(version: int, epoch_steps: int) -> Place:
    """In the iteration that makes ``version``, whose step the Trainer has not counted yet."""
    return Place(version, version - 1, version - 1, max(0, version - 1) // epoch_steps, epoch_steps)


def after(version: int, epoch_steps: int) -> Place:
    """In the iteration that has made ``version``: its validation, and the end of the epoch, are to come."""
    return Place(version, version, version - 1, max(0, version - 1) // epoch_steps, epoch_steps)


def move(trainer: Any, place: Place) -> None:
    """Make the loops of ``fit`` count as if they had come to ``place`` by themselves."""
    loop = trainer.fit_loop
    batches, steps = (
        loop.epoch_loop.batch_progress,
        loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step,
    )
    low = place.epoch * place.epoch_steps
    for progress, base in ((batches.total, 0), (batches.current, low)):
        progress.ready = progress.started = place.begun - base
        progress.processed = progress.completed = place.done - base
    for progress, base in ((steps.total, 0), (steps.current, low)):
        progress.ready, progress.completed = place.begun - base, place.done - base
    batches.is_last_batch = place.begun - low == place.epoch_steps
    loop.epoch_loop._batches_that_stepped = place.handled
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        progress.ready = progress.started = place.epoch + 1
        progress.processed = progress.completed = place.epoch
    if loop._data_fetcher is not None:
        loop._data_fetcher.fetched = place.begun - low


def end_at(trainer: Any, steps: int | None) -> None:
    """Let ``fit`` end after so many steps, in whichever epoch that is; None: never."""
    trainer.fit_loop.epoch_loop.max_steps = -1 if steps is None else steps
    trainer.fit_loop.max_epochs = -1
