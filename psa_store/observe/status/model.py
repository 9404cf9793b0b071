"""The status of a job: the one model that `psa status`, its JSON and the web page are views of.

The JSON is :class:`JobStatus` with a number "format". Its schema is published in
``docs/reference/status.schema.json``: fields are added under the same number, never renamed or removed. What is not
known is None. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from psa_store.cluster import Cell, Phase, ProcessRole
from psa_store.job.change import Change
from psa_store.job.document import ADDED_LATER
from psa_store.logs import Wait
from psa_store.observe.events import Event


class JobState(StrEnum):
    """What a job does, in a few words."""

    RUNNING = "running"
    HANDING_OVER = "handing over"
    RECOVERING = "recovering"
    AT_REST = "at rest"
    UNKNOWN = "not all is known"


class Severity(StrEnum):
    """SICK: training stands still, or what it made is at risk. WARN: it goes on, but an operator should know."""

    SICK = "sick"
    WARN = "warn"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not well."""

    severity: Severity
    what: str
    where: str
    look: str
    """A command that looks further, and on which host."""
    member: str = ""
    """The member that it is about; empty for none."""


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """What a server and a worker have in common."""

    id: str
    host: str
    pid: int
    endpoint: str
    """``host:port`` where it answers over HTTP; empty if it does not, or if that is not known."""
    stage: str | None
    resident_bytes: int | None
    heartbeat_age_s: float | None
    clock_ahead_s: float | None
    """Of its host's clock against ours; 0 if it is behind, which looks like an old heartbeat."""
    held_up: Wait | None = field(default=None, metadata=ADDED_LATER, kw_only=True)
    """What it waits for longer than is usual, with the cause if that is known, when it wrote its heartbeat."""


@dataclass(frozen=True, slots=True)
class ServerStatus(MemberStatus):
    """A server that is a member of the job."""

    address: str
    leaving: bool
    awaited: bool
    """The hand-over waits for it."""
    cannot_serve: bool
    shards: int
    version: int | None
    committed: int | None
    lag: int | None
    """Versions that it has and that are not durable."""
    problem: str
    """Why it did not answer; empty if it did."""


@dataclass(frozen=True, slots=True)
class WorkerStatus(MemberStatus):
    """A worker that is a member of the job."""

    ranks: tuple[int, ...]
    step: int | None
    behind: int | None
    """Steps, to the fastest worker."""
    compute_s: float | None
    """Of a step, its mean."""
    steps_per_s: float | None
    samples_per_s: float | None
    loss: float | None
    cells: tuple[Cell, ...] = field(default=(), metadata=ADDED_LATER)
    """Which stages of its ranks it computes, where the model has several."""
    waits_for: tuple[Cell, ...] = field(default=(), metadata=ADDED_LATER)
    """Cells of other workers of which something must arrive before it can go on with its step ..."""
    waits_s: float | None = field(default=None, metadata=ADDED_LATER)
    """... and for how long it had waited when it wrote its heartbeat."""
    wait_s: float | None = field(default=None, metadata=ADDED_LATER)
    """Of a step, the mean of what it waits, where the model has several stages."""


@dataclass(frozen=True, slots=True)
class GoneMember:
    """A member that the plan names and that is not there."""

    id: str
    role: ProcessRole
    host: str
    shards: int
    ranks: tuple[int, ...]
    cells: tuple[Cell, ...] = field(default=(), metadata=ADDED_LATER)


@dataclass(frozen=True, slots=True)
class RedisStatus:
    """Redis, and what it has of the job."""

    where: str
    problem: str
    """Why it does not answer; empty if it does."""
    damage: str
    """What is wrong with the data of the job; empty if nothing is."""
    latency_s: float | None
    used_bytes: int | None
    limit_bytes: int | None
    persistence: str | None
    cannot_persist: bool | None
    run_id: str | None
    replicas: int | None = field(default=None, metadata=ADDED_LATER)
    """That follow it now."""
    replicas_acknowledge: int = field(default=0, metadata=ADDED_LATER)
    """How many of them must have a version before it counts as durable."""
    replicas_acknowledged: int | None = field(default=None, metadata=ADDED_LATER)
    """How many had the newest durable version of the server of which the fewest had."""


@dataclass(frozen=True, slots=True)
class ZooKeeperMemberStatus:
    """One address of the connect string."""

    address: str
    mode: str
    problem: str
    """Why it does not serve; empty if it does."""


@dataclass(frozen=True, slots=True)
class ZooKeeperStatus:
    """ZooKeeper, as one session and a question to each of its members show it."""

    hosts: str
    problem: str
    server: str | None
    """That our session is connected to."""
    latency_s: float | None
    """To the leader and back."""
    session_timeout_s: float
    members: tuple[ZooKeeperMemberStatus, ...]


@dataclass(frozen=True, slots=True)
class SetAside:
    """A document that can not be read, and that nothing believes."""

    where: str
    """The path of a znode, or a key of Redis."""
    why: str


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Everything that is known about a job at one moment."""

    FORMAT: ClassVar[int] = 1

    job: str
    time: float
    """Of this status, in seconds since 1970."""
    state: JobState
    # what it is
    ranks: int | None
    seed: int | None
    mode: str | None
    compression: str | None
    commit_every: int | None
    commit_interval: int | None
    """Versions between two commits."""
    changes: tuple[Change, ...]
    """Of numbers of the optimizer, since the job began."""
    shards: int | None
    bytes: int | None
    """Of parameters and buffers."""
    # what it does
    version: int | None
    """That all servers have."""
    committed: int | None
    """The newest that all shards have in Redis."""
    lag_steps: int | None
    """Versions that are not durable ..."""
    lag_s: float | None
    """... and for how long nothing has been committed while there were some."""
    term: int | None
    revision: int | None
    phase: Phase | None
    phase_s: float | None
    """For how long it has been in this phase."""
    resumed_at: int | None
    """The version at which the term began."""
    controller: str | None
    """The id of the elected server."""
    samples_per_s: float | None
    loss: float | None
    """Of rank 0."""
    metrics: Mapping[str, float]
    """What scripts gave to ``worker.step(metrics=)``: the weighted mean of the newest of each rank."""
    # its members
    servers: tuple[ServerStatus, ...]
    workers: tuple[WorkerStatus, ...]
    missing: tuple[str, ...]
    """Ids of those that are gone."""
    gone: tuple[GoneMember, ...]
    unheld: tuple[int, ...]
    """Ranks that no living worker computes, or not all stages of them."""
    unreadable: tuple[str, ...]
    """Ids whose heartbeat cannot be read: another release wrote it."""
    # what it stands on
    redis: RedisStatus
    zookeeper: ZooKeeperStatus
    events: tuple[Event, ...]
    """The newest, the oldest of them first."""
    findings: tuple[Finding, ...] = field(default=())
    """What is not well, the worst first."""
    stages: int = field(default=1, metadata=ADDED_LATER)
    """Of the model; a worker computes cells, each a stage of a rank."""
    microbatches: int = field(default=1, metadata=ADDED_LATER)
    """Equal parts in which a rank's batch goes through the stages."""
    unheld_cells: tuple[Cell, ...] = field(default=(), metadata=ADDED_LATER)
    """Cells that no living worker computes, where the model has several stages."""
    set_aside: tuple[SetAside, ...] = field(default=(), metadata=ADDED_LATER)
    """Documents that can not be read now. What a running job needs is written again within seconds."""
    set_aside_count: int = field(default=0, metadata=ADDED_LATER)
    """How many its members have met since they began."""
