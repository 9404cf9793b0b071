"""A worker as its monitor sees it: the script's thread leaves a few numbers with every step, the monitor reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from psa_store.cluster import Cell
from psa_store.errors import UsageError
from psa_store.logs import Waits
from psa_store.observe import Activity
from psa_store.observe.health import COMPUTING, WAITING
from psa_store.observe.heartbeat import Reported, finite
from psa_store.observe.metrics import Metrics
from psa_store.optim import Optimizer
from psa_store.wire import Traffic
from psa_store.worker.batches import RankStep
from psa_store.worker.membership import Membership

SERVERS = "servers"
"""Where the wait of the script's thread for servers is noted; it is over when a step begins."""


@dataclass(slots=True)
class Progress:
    """What the script has done. Its thread alone writes; any thread reads."""

    waits: Waits = field(default_factory=Waits)
    """What this worker waits for, of all its threads."""
    stage: str = ""
    since_s: float | None = None
    """When the present stage began."""
    awaited: Sequence[Cell] = ()
    """Cells of other workers of which something must arrive before this one can go on with its step."""
    step: int | None = None
    loss: Tensor | float | None = None
    """One number, which that thread does not look at: on a GPU, that would wait for it."""
    loss_of: int | None = None
    """Of which rank it is."""
    reported: dict[int, tuple[float, Mapping[str, Tensor | float]]] = field(default_factory=dict)
    """By rank, the weight and the numbers of its newest step."""
    steps: int = 0
    samples: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    restarts: int = 0
    last_steps: dict[int, int] = field(default_factory=dict)
    """By rank, the last step that was begun."""

    def begin(self, rank_step: RankStep) -> None:
        """A batch is here, and its step is being computed from now on."""
        if rank_step.step <= self.last_steps.get(rank_step.rank, -1):
            self.restarts += 1
        self.last_steps[rank_step.rank] = rank_step.step
        self._enter(COMPUTING)
        self.step = rank_step.step

    def wait_for(self, cells: Sequence[Cell]) -> None:
        """In the middle of a step, nothing can be computed until these have sent something; none: it goes on."""
        stage = WAITING if cells else COMPUTING
        if stage != self.stage:
            self._enter(stage)
        self.awaited = cells

    def end(self, rank: int, samples: int | None, loss: Tensor | float | None) -> None:
        """It is computed, from so many samples; None: another worker has the loss. By assignments only: it costs every
        step."""
        self._enter(WAITING)
        self.awaited = ()
        self.steps += 1
        if samples is not None:
            self.samples += samples
            self.loss, self.loss_of = loss, rank
        elif rank == self.loss_of:
            self.loss = None  # its last stage has gone to that worker

    def _enter(self, stage: str) -> None:
        """Count the time of the present stage, and begin another."""
        now_s = time.monotonic()
        if self.since_s is not None:
            passed_s = now_s - self.since_s
            if self.stage == COMPUTING:
                self.compute_s += passed_s
            else:
                self.wait_s += passed_s
        self.since_s, self.stage = now_s, stage
        if stage == COMPUTING:
            self.waits.over(SERVERS)

    @property
    def step_s(self) -> float:
        """How long a step takes with what it waits, in the mean; 0 if that is not known."""
        return (self.compute_s + self.wait_s) / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """See :class:`psa_store.observe.Health`."""

    metrics: Metrics
    progress: Progress
    membership: Membership
    traffic: Traffic
    optimizer_at: Callable[[int], Optimizer]
    lease_left_s: Callable[[], float]
    set_aside: Callable[[], int]

    @property
    def member(self) -> str:
        return self.membership.standing.member

    def refresh(self) -> None:
        progress, standing = self.progress, self.membership.standing
        values = {
            "sent_bytes": self.traffic.sent_bytes,
            "received_bytes": self.traffic.received_bytes,
            "lease_left_seconds": max(0.0, self.lease_left_s()),
            "set_aside": self.set_aside(),
            "ranks_held": len(standing.held),
            "cells_held": len(standing.cells),
            "steps": progress.steps,
            "samples": progress.samples,
            "compute_seconds": progress.compute_s,
            "wait_seconds": progress.wait_s,
            "restarts_of_steps": progress.restarts,
        }
        step, loss = progress.step, progress.loss
        if standing.plan is not None:
            values["term"] = standing.plan.term
        if step is not None:
            values["step"] = step
            values["learning_rate"] = self.optimizer_at(step).lr_at(step)
        if loss is not None:
            values["loss"] = float(loss)
        for name, value in values.items():
            self.metrics.set(name, value)

    @property
    def activity(self) -> Activity:
        reported = {
            rank: Reported(weight, finite({name: float(value) for name, value in numbers.items()}))
            for rank, (weight, numbers) in self.progress.reported.copy().items()
        }
        progress, standing = self.progress, self.membership.standing
        awaited, since_s = tuple(progress.awaited), progress.since_s
        stages = standing.plan.stages if standing.plan else 1
        return Activity(
            progress.stage,
            ranks=standing.held,
            stages=stages,
            cells=standing.cells if stages > 1 else (),
            waits_for=awaited,
            waits_s=round(time.monotonic() - since_s, 3) if awaited and since_s is not None else None,
            held_up=progress.waits.longest(),
            reported=reported,
        )

    def why_not_alive(self) -> str:
        """The script may compute as long as it likes; only what follows the plan must go on."""
        return "" if self.membership.alive else "the thread that follows the plan has ended"

    def why_not_ready(self) -> str:
        standing = self.membership.standing
        if standing.failure is not None:
            return str(standing.failure)
        return "" if standing.plan and standing.plan.owners else "there is no plan yet: no server has taken the shards"


def as_reported(
    loss: Tensor | float | None, metrics: Mapping[str, Tensor | float]
) -> tuple[Tensor | float | None, Mapping[str, Tensor | float]]:
    """Return what a script reports in a form that another thread may read later; raises UsageError if it is no such."""
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise UsageError(f"worker.step(metrics={metrics!r}): give a dictionary from names to numbers")
    if loss is not None:
        loss = _number("loss", loss)
    return loss, {name: _number(f"metrics[{name!r}]", value) for name, value in metrics.items()}


def _number(what: str, value: Tensor | float) -> Tensor | float:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            kind = "complex tensor" if value.is_complex() else "tensor"
            raise UsageError(
                f"worker.step({what}): a {kind} of shape {tuple(value.shape)}; give one number, or nothing"
            )
        return value.detach()
    if not isinstance(value, float | int | np.floating | np.integer):
        raise UsageError(f"worker.step({what}): a {type(value).__name__}; give one number, or nothing")
    return value
