"""The numbers that a process keeps about itself, and the one table that names them.

The threads that do the work write them, with an assignment or an addition each; whoever shows them (the pulse in Redis,
Prometheus, TensorBoard) reads when it likes. So a step costs a few assignments, however many look on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """Who has a vital."""

    SERVER = "server"
    WORKER = "worker"


class Kind(StrEnum):
    """COUNTER only grows while the process lives; GAUGE is what was seen last."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Vital:
    """One number. Prometheus knows it as ``psa_<name>``, a counter with ``_total`` at its end."""

    name: str
    kind: Kind
    roles: frozenset[Role]
    help: str


_SERVER = frozenset({Role.SERVER})
_WORKER = frozenset({Role.WORKER})
_BOTH = _SERVER | _WORKER

VITALS = (
    Vital("epoch", Kind.GAUGE, _BOTH, "epoch of the plan that this process follows"),
    Vital("sent_bytes", Kind.COUNTER, _BOTH, "bytes of frames sent to members of the job, tensors included"),
    Vital("received_bytes", Kind.COUNTER, _BOTH, "bytes of frames received from members of the job"),
    Vital("lease_left_seconds", Kind.GAUGE, _BOTH, "how long ZooKeeper may stay silent before this process stops"),
    # servers
    Vital("version", Kind.GAUGE, _SERVER, "newest version that all shards of this server have"),
    Vital("committed_version", Kind.GAUGE, _SERVER, "newest version that this server has made durable"),
    Vital("committed_time_seconds", Kind.GAUGE, _SERVER, "when that was, in seconds since 1970"),
    Vital("commit_seconds", Kind.GAUGE, _SERVER, "how long the last commit took, from the copy to the last flip"),
    Vital("commits", Kind.COUNTER, _SERVER, "versions made durable"),
    Vital("commit_retries", Kind.COUNTER, _SERVER, "times that a commit had to be tried again: Redis did not answer"),
    Vital("shards", Kind.GAUGE, _SERVER, "shards that this server leads"),
    Vital("controller", Kind.GAUGE, _SERVER, "1 in the elected controller, else 0"),
    Vital("gradient_norm", Kind.GAUGE, _SERVER, "global norm of the last mean gradient, where it is clipped"),
    Vital("skipped_steps", Kind.COUNTER, _SERVER, "steps without an update, for NaN or Inf in a gradient"),
    Vital("take_overs", Kind.COUNTER, _SERVER, "epochs that this server began as controller"),
    Vital("take_over_seconds", Kind.GAUGE, _SERVER, "how long the last of them took, from the decision to the plan"),
    Vital("checkpoints", Kind.COUNTER, _SERVER, "checkpoints completed by this server as controller"),
    Vital("checkpoint_failures", Kind.COUNTER, _SERVER, "checkpoints that it had to abort"),
    Vital("checkpoint_time_seconds", Kind.GAUGE, _SERVER, "when the last checkpoint was completed, since 1970"),
    # workers
    Vital("step", Kind.GAUGE, _WORKER, "step that this worker computes"),
    Vital("steps", Kind.COUNTER, _WORKER, "steps of any of its ranks that it has computed"),
    Vital("ranks_held", Kind.GAUGE, _WORKER, "ranks that the plan gives to this worker"),
    Vital("samples", Kind.COUNTER, _WORKER, "samples that it has computed"),
    Vital("loss", Kind.GAUGE, _WORKER, "loss that the script gave to worker.step()"),
    Vital("learning_rate", Kind.GAUGE, _WORKER, "learning rate of the first parameter group"),
    Vital("compute_seconds", Kind.COUNTER, _WORKER, "time between a batch and its worker.step()"),
    Vital("wait_seconds", Kind.COUNTER, _WORKER, "time in worker.step() and between it and the next batch"),
    Vital("restarts_of_steps", Kind.COUNTER, _WORKER, "steps that began again because an epoch ended"),
)
"""All of them. The dashboard and the alerts in ``deploy/`` use these names; a test compares."""


class Vitals:
    """Those of one process. One thread writes a given number; any thread reads."""

    def __init__(self, role: Role, member: str) -> None:
        self.role = role
        self.member = member
        self._values = {vital.name: 0.0 for vital in VITALS if role in vital.roles}
        self._seen: set[str] = set()

    def set(self, name: str, value: float) -> None:
        assert name in self._values, name
        self._values[name] = value
        self._seen.add(name)

    def add(self, name: str, amount: float = 1.0) -> None:
        self._values[name] += amount
        self._seen.add(name)

    def read(self) -> dict[str, float]:
        """Counters, and the gauges that were ever set."""
        return {
            vital.name: self._values[vital.name]
            for vital in VITALS
            if vital.name in self._seen or (vital.kind is Kind.COUNTER and vital.name in self._values)
        }
