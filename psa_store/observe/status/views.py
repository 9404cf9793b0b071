"""What Redis, ZooKeeper and the servers of a job answered, of which its status is put together. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from psa_store.cluster import Member, Plan
from psa_store.coordination import ZooKeeperMember
from psa_store.job.config import JobConfig
from psa_store.job.document import Damaged
from psa_store.observe.events import Event
from psa_store.observe.heartbeat import Heartbeat
from psa_store.storage import RedisFacts


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """What a server answered."""

    version: int | None = None
    committed: int | None = None
    stage: str | None = None
    problem: str = ""
    """Why it did not answer."""

    @property
    def lag(self) -> int | None:
        """Versions that it has and that are not durable."""
        return None if self.version is None or self.committed is None else self.version - self.committed


@dataclass(frozen=True, slots=True)
class RedisView:
    """What Redis answered; what it did not get to answer is as if there were none."""

    where: str
    problem: str = ""
    damage: str = ""
    facts: RedisFacts | None = None
    config: JobConfig | None = None
    shards: int | None = None
    arena_bytes: int | None = None
    committed: int | None = None
    heartbeats: Mapping[str, Heartbeat | None] = field(default_factory=dict)
    events: Sequence[Event] = ()
    damaged: Sequence[Damaged] = ()


@dataclass(frozen=True, slots=True)
class ZooKeeperView:
    """What ZooKeeper answered, and the servers that it named (``answers``, by id)."""

    hosts: str
    session_timeout_s: float
    problem: str = ""
    server: str | None = None
    latency_s: float | None = None
    members: Sequence[ZooKeeperMember] = ()
    config: JobConfig | None = None
    plan: Plan | None = None
    plan_time_s: float | None = None
    servers: Sequence[Member] = ()
    workers: Sequence[Member] = ()
    damaged: Sequence[Damaged] = ()
    controller: str | None = None
    answers: Mapping[str, ServerAnswer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HeartbeatAge:
    """When a heartbeat was first seen as it is, by our monotonic clock, and how old it was then."""

    time_s: float
    seen_s: float
    age_s: float
    """At first sight by the clock of its host, which may be wrong: below 0, or as old as it seems."""
    looked_s: float
    """When it was seen last."""

    @classmethod
    def after(cls, before: HeartbeatAge | None, time_s: float, now_s: float, wall_s: float) -> HeartbeatAge:
        """Follow the heartbeat of one member: one that changed is new, whatever its host takes the time for.

        Args:
            before: what this method returned for the member the last time.
            time_s: the heartbeat's own.
        """
        if before is None:
            return cls(time_s, now_s, wall_s - time_s, now_s)
        if before.time_s == time_s:
            return replace(before, looked_s=now_s)
        return cls(time_s, now_s, min(max(0.0, wall_s - time_s), now_s - before.looked_s), now_s)
