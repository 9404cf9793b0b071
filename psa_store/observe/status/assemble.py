"""The status of a job, put together from what Redis, ZooKeeper and the servers answered.

Pure: no I/O, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from psa_store.cluster import NO_WORKER, Cell, Member, Phase, Plan, ProcessRole
from psa_store.observe.heartbeat import Heartbeat, mean_reported
from psa_store.observe.status.diagnosis import diagnose
from psa_store.observe.status.model import (
    GoneMember,
    JobState,
    JobStatus,
    RedisStatus,
    ServerStatus,
    SetAside,
    WorkerStatus,
    ZooKeeperMemberStatus,
    ZooKeeperStatus,
)
from psa_store.observe.status.views import HeartbeatAge, RedisView, ServerAnswer, ZooKeeperView
from psa_store.storage import RedisFacts

_HEARTBEAT_EVERY_S = 1.0
_HEARTBEAT_SHOWN_S = 60.0
"""Without ZooKeeper, a process whose heartbeat is so fresh counts as a member."""


@dataclass(frozen=True, slots=True)
class _Beat:
    """The heartbeat of one member and its age by our clock; nothing is known if there is none."""

    heartbeat: Heartbeat | None = None
    age_s: float | None = None
    clock_ahead_s: float | None = None


_NO_BEAT = _Beat()


def assemble(
    job: str, time_s: float, redis: RedisView, zookeeper: ZooKeeperView, ages: Mapping[str, HeartbeatAge], now_s: float
) -> JobStatus:
    """Put it together, findings included. ``time_s``: since 1970; ``now_s``: of the clock of ``ages``."""
    config, plan = redis.config or zookeeper.config, zookeeper.plan
    beats = {
        member: _Beat(
            redis.heartbeats.get(member),
            round(max(0.0, age.age_s) + now_s - age.seen_s, 3),
            round(max(0.0, -age.age_s), 3),
        )
        for member, age in ages.items()
    }
    stages = config.stages if config else plan.stages if plan else 1
    servers, workers = (
        _from_heartbeats(beats, stages) if zookeeper.problem else _from_zookeeper(zookeeper, beats, stages)
    )
    workers = _with_behind(workers)
    owning = [each for each in servers if each.shards and each.version is not None]
    living = {each.id for each in servers} | {each.id for each in workers}
    known = None if zookeeper.problem else plan
    gone, unheld = (_gone(known, living), _unheld(known, living)) if known else ((), ())
    of_redis = _redis(redis)
    status = JobStatus(
        job=job,
        time=time_s,
        state=JobState.UNKNOWN,
        ranks=config.ranks if config else None,
        seed=config.seed if config else None,
        mode=str(config.mode) if config else None,
        compression=str(config.compression) if config else None,
        commit_every=config.commit_every if config else None,
        commit_interval=config.commit_interval if config else None,
        changes=config.changes if config else (),
        shards=redis.shards if redis.shards is not None or plan is None else len(plan.owners),
        bytes=redis.arena_bytes,
        version=min((each.version for each in owning if each.version is not None), default=None),
        committed=_durable(redis.committed, owning) if of_redis.replicas_acknowledge else redis.committed,
        lag_steps=max((each.lag for each in owning if each.lag is not None), default=None),
        lag_s=_lag_s(owning, beats, time_s),
        term=plan.term if plan else None,
        revision=plan.revision if plan else None,
        phase=plan.phase if plan else None,
        phase_s=max(0.0, time_s - zookeeper.plan_time_s) if plan and zookeeper.plan_time_s is not None else None,
        resumed_at=plan.resume if plan else None,
        controller=zookeeper.controller,
        samples_per_s=_sum(each.samples_per_s for each in workers),
        loss=next((each.loss for each in workers if _has(each, Cell(0, stages - 1)) and each.loss is not None), None),
        metrics=mean_reported(each for each in redis.heartbeats.values() if each is not None),
        servers=servers,
        workers=workers,
        missing=tuple(sorted(each.id for each in gone)),
        gone=gone,
        unheld=tuple(sorted({cell.rank for cell in unheld})),
        unreadable=tuple(sorted(member for member, each in redis.heartbeats.items() if each is None)),
        redis=of_redis,
        zookeeper=_zookeeper(zookeeper),
        events=tuple(redis.events),
        stages=stages,
        microbatches=config.microbatches if config else 1,
        unheld_cells=unheld if stages > 1 else (),
        set_aside=tuple(SetAside(each.where, each.why) for each in (*redis.damaged, *zookeeper.damaged)),
        set_aside_count=sum(each.whole("set_aside") or 0 for each in redis.heartbeats.values() if each is not None),
    )
    return replace(status, state=_state(status), findings=tuple(diagnose(status)))


def _state(status: JobStatus) -> JobState:
    if status.redis.problem or status.zookeeper.problem:
        return JobState.UNKNOWN
    if not status.servers and not status.workers:
        return JobState.AT_REST
    if status.missing:
        return JobState.RECOVERING
    return JobState.RUNNING if status.phase is Phase.RUN else JobState.HANDING_OVER


# --- members

_Members = tuple[tuple[ServerStatus, ...], tuple[WorkerStatus, ...]]


def _from_zookeeper(zookeeper: ZooKeeperView, beats: Mapping[str, _Beat], stages: int) -> _Members:
    """Servers and workers as ZooKeeper knows them."""
    plan = zookeeper.plan
    servers = (
        _server(
            member,
            len(plan.shards_of(member.id)) if plan else 0,
            zookeeper.answers.get(member.id, ServerAnswer()),
            plan,
            beats.get(member.id, _NO_BEAT),
        )
        for member in sorted(zookeeper.servers, key=lambda each: each.id)
    )
    workers = (
        _worker(member, plan.cells_of(member.id) if plan else (), stages, beats.get(member.id, _NO_BEAT))
        for member in sorted(zookeeper.workers, key=lambda each: each.id)
    )
    return tuple(servers), tuple(workers)


def _from_heartbeats(beats: Mapping[str, _Beat], stages: int) -> _Members:
    """The same, of members that are known by their heartbeats only."""
    servers, workers = [], []
    for name, each in sorted(beats.items()):
        heartbeat = each.heartbeat
        if heartbeat is None or each.age_s is None or each.age_s > _HEARTBEAT_SHOWN_S:
            continue
        member = Member(name, heartbeat.host, heartbeat.pid)
        if heartbeat.role is ProcessRole.SERVER:
            versions = heartbeat.whole("version"), heartbeat.whole("committed_version")
            answer = ServerAnswer(*versions, stage=heartbeat.stage)
            servers.append(_server(member, heartbeat.shards, answer, None, each))
        else:
            workers.append(_worker(member, heartbeat.cells or tuple(map(Cell, heartbeat.ranks)), stages, each))
    return tuple(servers), tuple(workers)


def _server(member: Member, shards: int, answer: ServerAnswer, plan: Plan | None, beat: _Beat) -> ServerStatus:
    return ServerStatus(
        id=member.id,
        host=member.host,
        pid=member.pid,
        address=member.address,
        endpoint=beat.heartbeat.endpoint if beat.heartbeat else "",
        leaving=member.leaving,
        awaited=bool(shards) and plan is not None and _is_awaited(member, plan),
        cannot_serve=plan is not None and member.reload_term == plan.term,
        shards=shards,
        version=answer.version,
        committed=answer.committed,
        stage=answer.stage,
        problem=answer.problem,
        lag=answer.lag,
        resident_bytes=beat.heartbeat.resident_bytes if beat.heartbeat else None,
        heartbeat_age_s=beat.age_s,
        clock_ahead_s=beat.clock_ahead_s,
        held_up=beat.heartbeat.held_up if beat.heartbeat else None,
    )


def _is_awaited(member: Member, plan: Plan) -> bool:
    if plan.phase is Phase.FREEZE:
        return member.frozen_revision != plan.freeze_revision
    return plan.phase is Phase.STOP and member.stopped_version != plan.stop_version


def _worker(member: Member, cells: tuple[Cell, ...], stages: int, beat: _Beat) -> WorkerStatus:
    heartbeat = beat.heartbeat or Heartbeat(member.id, ProcessRole.WORKER, 0.0)
    steps, metrics = heartbeat.metrics.get("steps"), heartbeat.metrics
    counts_samples = heartbeat.samples_per_s or any(cell.stage == stages - 1 for cell in cells) or not cells
    return WorkerStatus(
        id=member.id,
        host=member.host,
        pid=member.pid,
        endpoint=heartbeat.endpoint,
        ranks=tuple(dict.fromkeys(cell.rank for cell in cells)),
        step=heartbeat.whole("step"),
        behind=None,
        compute_s=metrics["compute_seconds"] / steps if steps and "compute_seconds" in metrics else None,
        steps_per_s=heartbeat.steps_per_s,
        samples_per_s=heartbeat.samples_per_s if counts_samples else None,
        stage=heartbeat.stage,
        loss=metrics.get("loss"),
        resident_bytes=heartbeat.resident_bytes,
        heartbeat_age_s=beat.age_s,
        clock_ahead_s=beat.clock_ahead_s,
        cells=cells if stages > 1 else (),
        waits_for=heartbeat.waits_for,
        waits_s=heartbeat.waits_s,
        held_up=heartbeat.held_up,
        wait_s=metrics["wait_seconds"] / steps if steps and stages > 1 and "wait_seconds" in metrics else None,
    )


def _has(worker: WorkerStatus, cell: Cell) -> bool:
    return cell in (worker.cells or map(Cell, worker.ranks))


def _with_behind(workers: tuple[WorkerStatus, ...]) -> tuple[WorkerStatus, ...]:
    """The same workers, with how far each is behind the fastest by now.

    A heartbeat is up to a second old, and all are of different ages: steps go on at the rate of the heartbeat.
    """
    steps = {
        each.id: each.step
        + min(each.heartbeat_age_s or 0.0, _HEARTBEAT_EVERY_S) * (each.steps_per_s or 0.0) / len(each.ranks)
        for each in workers
        if each.ranks and each.step is not None
    }
    fastest = max(steps.values(), default=0.0)
    return tuple(
        replace(each, behind=round(fastest - steps[each.id])) if each.id in steps else each for each in workers
    )


# --- the plan against the members that are there


def _gone(plan: Plan, living: set[str]) -> tuple[GoneMember, ...]:
    """Members that the plan names but that are gone."""
    servers = [
        GoneMember(each.id, ProcessRole.SERVER, each.host, len(plan.shards_of(each.id)), ())
        for each in plan.servers
        if each.id not in living
    ]
    workers = [
        GoneMember(each, ProcessRole.WORKER, "", 0, plan.ranks_of(each), plan.cells_of(each) if plan.stages > 1 else ())
        for each in sorted(set(plan.cells) - living - {NO_WORKER})
    ]
    return (*servers, *workers)


def _unheld(plan: Plan, living: set[str]) -> tuple[Cell, ...]:
    return tuple(sorted(cell for holder in set(plan.cells) - living for cell in plan.cells_of(holder)))


def _lag_s(owning: Sequence[ServerStatus], beats: Mapping[str, _Beat], time_s: float) -> float | None:
    """For how long the least durable server has committed nothing, while it has what could be."""
    ages = []
    for server in owning:
        heartbeat = beats.get(server.id, _NO_BEAT).heartbeat
        committed_s = heartbeat.metrics.get("committed_time_seconds") if heartbeat else None
        if server.lag == 0:
            ages.append(0.0)
        elif committed_s:
            ages.append(max(0.0, time_s - committed_s))
    return max(ages, default=None)


def _durable(stored: int | None, owning: Sequence[ServerStatus]) -> int | None:
    """The newest version that all servers say is durable, where replicas must acknowledge it."""
    known = [each.committed for each in owning if each.committed is not None]
    return stored if stored is None else min([stored, *known])


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


# --- the dependencies


def _redis(view: RedisView) -> RedisStatus:
    facts = view.facts
    if facts is None:
        return RedisStatus(view.where, view.problem, view.damage, None, None, None, None, None, None)
    known = [each.metrics for each in view.heartbeats.values() if each is not None]
    limits = [limit for limit in (facts.memory_limit_bytes, facts.system_memory_bytes) if limit > 0]
    return RedisStatus(
        where=view.where,
        problem=view.problem,
        damage=view.damage,
        latency_s=facts.round_trip_s,
        used_bytes=facts.used_memory_bytes,
        limit_bytes=min(limits, default=None),
        persistence=_persistence(facts),
        cannot_persist=facts.cannot_persist,
        run_id=facts.run_id,
        replicas=facts.replicas,
        replicas_acknowledge=max((int(each.get("replicas_acknowledge", 0)) for each in known), default=0),
        replicas_acknowledged=min(
            (int(each["replicas_acknowledged"]) for each in known if "replicas_acknowledged" in each), default=None
        ),
    )


def _persistence(facts: RedisFacts) -> str:
    if facts.appends:
        return f"appendonly, appendfsync {facts.appendfsync or 'unknown'}"
    if facts.save is None:
        return "no log; snapshots unknown"
    return f"snapshots only (save {facts.save})" if facts.save else "none"


def _zookeeper(view: ZooKeeperView) -> ZooKeeperStatus:
    return ZooKeeperStatus(
        hosts=view.hosts,
        problem=view.problem,
        server=view.server,
        latency_s=view.latency_s,
        session_timeout_s=view.session_timeout_s,
        members=tuple(ZooKeeperMemberStatus(each.address, each.mode, each.problem) for each in view.members),
    )
