"""A worker as its monitor sees it: what the script's thread leaves here with every step costs it microseconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from psa_store.errors import PsaError
from psa_store.observe import Activity
from psa_store.observe.health import COMPUTING, WAITING
from psa_store.observe.metrics import Metrics
from psa_store.optim import Optimizer
from psa_store.wire import Traffic
from psa_store.worker.batches import RankStep
from psa_store.worker.membership import Membership


class WorkerHealth:
    """See :class:`psa_store.observe.Health`. The thread of the script calls :meth:`begin` and :meth:`end` in turn."""

    def __init__(
        self,
        metrics: Metrics,
        membership: Membership,
        traffic: Traffic,
        optimizer: Optimizer,
        lease_left_s: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._membership = membership
        self._traffic = traffic
        self._optimizer = optimizer
        self._lease_left_s = lease_left_s
        self._stage = ""
        self._since_s: float | None = None
        self._last_steps: dict[int, int] = {}
        """By rank, the last step that we began."""
        self._step: int | None = None
        self._loss: Tensor | float | None = None

    # --- the script's thread

    def begin(self, rank_step: RankStep) -> None:
        """A batch is here, and its step is being computed from now on."""
        now_s = time.monotonic()
        if self._since_s is not None:
            self._metrics.add("wait_seconds", now_s - self._since_s)
        if rank_step.step <= self._last_steps.get(rank_step.rank, -1):
            self._metrics.add("restarts_of_steps")
        self._last_steps[rank_step.rank] = rank_step.step
        self._metrics.set("step", rank_step.step)
        self._since_s, self._stage, self._step = now_s, COMPUTING, rank_step.step

    def end(self, samples: int, loss: Tensor | float | None) -> None:
        """The step is computed. ``loss``: one number, which nobody looks at here: that would wait for a GPU."""
        assert self._since_s is not None
        now_s = time.monotonic()
        self._metrics.add("compute_seconds", now_s - self._since_s)
        self._metrics.add("steps")
        self._metrics.add("samples", samples)
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        self._since_s, self._stage = now_s, WAITING

    # --- the monitor

    @property
    def member(self) -> str:
        return self._membership.standing.member

    def refresh(self) -> None:
        self._metrics.set("sent_bytes", self._traffic.sent_bytes)
        self._metrics.set("received_bytes", self._traffic.received_bytes)
        self._metrics.set("lease_left_seconds", max(0.0, self._lease_left_s()))
        plan = self._membership.standing.plan
        if plan is not None:
            self._metrics.set("term", plan.term)
        self._metrics.set("ranks_held", len(self._ranks()))
        step, loss = self._step, self._loss
        if step is not None:
            self._metrics.set("learning_rate", self._optimizer.lr_at(step))
        if loss is not None:
            self._metrics.set("loss", float(loss))

    @property
    def activity(self) -> Activity:
        return Activity(self._stage, ranks=self._ranks())

    def why_not_alive(self) -> str:
        """The script may compute as long as it likes; only what follows the plan must go on."""
        return "" if self._membership.alive else "the thread that follows the plan has ended"

    def why_not_ready(self) -> str:
        try:
            plan = self._membership.standing.plan
        except PsaError as error:
            return str(error)
        return "" if plan is not None and plan.owners else "there is no plan yet: no server has taken the shards"

    def _ranks(self) -> tuple[int, ...]:
        standing = self._membership.standing
        return standing.plan.ranks_of(standing.member) if standing.plan is not None else ()
