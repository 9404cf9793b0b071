"""The numbers that a process keeps about itself, and the one table that names them.

The threads that do the work write them, with an assignment or an addition each; heartbeats and Prometheus read them at
any time. So a step costs a few assignments, however many readers there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from psa_store.cluster import ProcessRole


class Kind(StrEnum):
    """COUNTER only grows while the process lives; GAUGE is what was seen last."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Metric:
    """One number. Prometheus knows it as ``psa_<name>``, a counter with ``_total`` at its end."""

    name: str
    kind: Kind
    roles: frozenset[ProcessRole]
    help: str


_SERVER = frozenset({ProcessRole.SERVER})
_WORKER = frozenset({ProcessRole.WORKER})
_BOTH = _SERVER | _WORKER

METRICS = (
    Metric("term", Kind.GAUGE, _BOTH, "term of the plan that this process follows"),
    Metric("sent_bytes", Kind.COUNTER, _BOTH, "bytes of frames sent to members of the job, tensors included"),
    Metric("received_bytes", Kind.COUNTER, _BOTH, "bytes of frames received from members of the job"),
    Metric("lease_left_seconds", Kind.GAUGE, _BOTH, "how long ZooKeeper may stay silent before this process stops"),
    Metric("set_aside", Kind.COUNTER, _BOTH, "documents in ZooKeeper or Redis that it could not read and set aside"),
    # servers
    Metric("version", Kind.GAUGE, _SERVER, "newest version that all shards of this server have"),
    Metric("committed_version", Kind.GAUGE, _SERVER, "newest version that this server has made durable"),
    Metric("committed_time_seconds", Kind.GAUGE, _SERVER, "when that was, in seconds since 1970"),
    Metric("commit_seconds", Kind.GAUGE, _SERVER, "how long the last commit took, from the copy to the last flip"),
    Metric("commits", Kind.COUNTER, _SERVER, "versions made durable"),
    Metric("commit_retries", Kind.COUNTER, _SERVER, "times that a commit had to be tried again: Redis did not answer"),
    Metric(
        "replicas_acknowledge", Kind.GAUGE, _SERVER, "replicas of Redis that must have a version before it is durable"
    ),
    Metric("replicas_acknowledged", Kind.GAUGE, _SERVER, "replicas that had the newest durable version, when it was"),
    Metric("lost_steps", Kind.COUNTER, _SERVER, "steps whose durable versions Redis lost; written again from memory"),
    Metric("shards", Kind.GAUGE, _SERVER, "shards that this server owns"),
    Metric("controller", Kind.GAUGE, _SERVER, "1 in the elected controller, else 0"),
    Metric("gradient_norm", Kind.GAUGE, _SERVER, "global norm of the last mean gradient, where it is clipped"),
    Metric("skipped_steps", Kind.COUNTER, _SERVER, "steps without an update, for NaN or Inf in a gradient"),
    Metric("take_overs", Kind.COUNTER, _SERVER, "terms that this server began as controller"),
    Metric("take_over_seconds", Kind.GAUGE, _SERVER, "how long the last of them took, from the decision to the plan"),
    Metric("checkpoints", Kind.COUNTER, _SERVER, "checkpoints completed by this server as controller"),
    Metric("checkpoint_failures", Kind.COUNTER, _SERVER, "checkpoints that it had to abort"),
    Metric("checkpoint_time_seconds", Kind.GAUGE, _SERVER, "when the last checkpoint was completed, since 1970"),
    Metric("refused_connections", Kind.COUNTER, _SERVER, "connections ended: without the key, silent, or out of line"),
    # workers
    Metric("step", Kind.GAUGE, _WORKER, "step that this worker computes"),
    Metric("steps", Kind.COUNTER, _WORKER, "steps of any of its ranks that it has computed"),
    Metric("ranks_held", Kind.GAUGE, _WORKER, "ranks that the plan gives to this worker, or stages of them"),
    Metric("cells_held", Kind.GAUGE, _WORKER, "cells that the plan gives to this worker: stages of ranks"),
    Metric("samples", Kind.COUNTER, _WORKER, "samples that it has computed; with stages, where the last one is"),
    Metric("loss", Kind.GAUGE, _WORKER, "loss that the script gave to worker.step()"),
    Metric("learning_rate", Kind.GAUGE, _WORKER, "learning rate of the first parameter group"),
    Metric(
        "compute_seconds", Kind.COUNTER, _WORKER, "time between a batch and its worker.step(), but for waits for stages"
    ),
    Metric("wait_seconds", Kind.COUNTER, _WORKER, "time in worker.step(), from it to the next batch, and for stages"),
    Metric("restarts_of_steps", Kind.COUNTER, _WORKER, "steps that began again because a term ended"),
)
"""All of them. The dashboard and the alerts in ``deploy/`` use these names; a test compares."""


class Metrics:
    """Those of one process. One thread writes a given number; any thread reads.

    ``values``: the counters, and the gauges that were ever set. What changes with every step is written here directly.
    """

    def __init__(self, role: ProcessRole, member: str) -> None:
        self.role = role
        self.member = member
        self._known = {metric.name for metric in METRICS if role in metric.roles}
        self.values = {metric.name: 0.0 for metric in METRICS if role in metric.roles and metric.kind is Kind.COUNTER}

    def set(self, name: str, value: float) -> None:
        assert name in self._known, name
        self.values[name] = value

    def add(self, name: str, amount: float = 1.0) -> None:
        self.values[name] += amount

    def read(self) -> dict[str, float]:
        """The values as they are now, in the order of the table."""
        values = self.values.copy()
        return {metric.name: values[metric.name] for metric in METRICS if metric.name in values}
