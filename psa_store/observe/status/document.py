"""The document of a look, put together from what Redis, ZooKeeper and the servers said. Its keys: ``Observer.look``.

Pure: no I/O, no threads, no clock. Heartbeats come from other processes, perhaps of another version of this package:
what is not as expected in one is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from psa_store.cluster import Member, Phase, Plan
from psa_store.coordination import ZooKeeperMember
from psa_store.job.config import JobConfig
from psa_store.observe.status.diagnosis import diagnose
from psa_store.storage import RedisFacts

RawHeartbeat = Mapping[str, Any]
Hearts = Mapping[str, Mapping[str, float]]
_Entry = dict[str, Any]
_NOBODY_ASKED: Mapping[str, Any] = {"version": None, "committed": None, "stage": None, "sick": ""}
_HEARTBEAT_EVERY_S = 1.0
_HEARTBEAT_SHOWN_S = 60.0
"""Without ZooKeeper, whoever was heard of so recently counts as a member."""


@dataclass(frozen=True, slots=True)
class RedisView:
    """What Redis said; what it did not get to say is as if there were none."""

    where: str
    problem: str = ""
    damage: str = ""
    facts: RedisFacts | None = None
    config: JobConfig | None = None
    shards: int | None = None
    arena_bytes: int | None = None
    committed: int | None = None
    heartbeats: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ZooKeeperView:
    """What ZooKeeper said, and the servers that it named (``answers``, by id)."""

    hosts: str
    session_timeout_s: float
    problem: str = ""
    server: object = None
    latency_s: float | None = None
    members: Sequence[ZooKeeperMember] = ()
    config: JobConfig | None = None
    plan: Plan | None = None
    plan_time_s: float = 0.0
    servers: Sequence[Member] = ()
    workers: Sequence[Member] = ()
    controller: str | None = None
    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HeartbeatAge:
    """When a heartbeat was first seen as it is, by the monotonic clock of who looks, and how old it was then."""

    time_s: float
    seen_s: float
    age_s: float
    """At first sight by the clock of its host, which may be wrong: below 0, or as old as it seems."""
    looked_s: float
    """When it was seen last."""

    @classmethod
    def after(cls, before: HeartbeatAge | None, heartbeat: RawHeartbeat, now_s: float, wall_s: float) -> HeartbeatAge:
        """``before``: of the look before. A heartbeat that changed since is new, whatever its host takes the time
        for."""
        time_s = _number(heartbeat.get("time")) or 0.0
        if before is None:
            return cls(time_s, now_s, wall_s - time_s, now_s)
        if before.time_s == time_s:
            return replace(before, looked_s=now_s)
        return cls(time_s, now_s, min(max(0.0, wall_s - time_s), now_s - before.looked_s), now_s)


def assemble(
    job: str,
    time_s: float,
    redis: RedisView,
    zookeeper: ZooKeeperView,
    heard: Mapping[str, HeartbeatAge],
    now_s: float,
) -> dict[str, Any]:
    """Put it together, findings included. ``time_s``: since 1970; ``now_s``: of the clock of ``heard``."""
    config, plan = redis.config or zookeeper.config, zookeeper.plan
    hearts = {member: _heart(each, now_s) for member, each in heard.items()}
    if zookeeper.problem:
        servers, workers = _heard_of(redis.heartbeats, hearts)
    else:
        servers, workers = _seen(zookeeper, redis.heartbeats, hearts)
    steps = {each["id"]: _step_now(each) for each in workers if each["ranks"] and each["step"] is not None}
    for worker in workers:
        worker["behind"] = round(max(steps.values()) - steps[worker["id"]]) if worker["id"] in steps else None
    leading = [each for each in servers if each["shards"] and each["version"] is not None]
    lags = [each["lag"] for each in leading if each["lag"] is not None]
    living = {each["id"] for each in (*servers, *workers)}
    gone = [] if zookeeper.problem else _gone(plan, living)
    document: dict[str, Any] = {
        "job": job,
        "time": time_s,
        "ranks": config.ranks if config else None,
        "seed": config.seed if config else None,
        "mode": str(config.mode) if config else None,
        "compression": str(config.compression) if config else None,
        "commit_every": config.commit_every if config else None,
        "commit_interval": config.commit_interval if config else None,
        "shards": redis.shards if redis.shards is not None or plan is None else len(plan.owners),
        "bytes": redis.arena_bytes,
        "version": min((each["version"] for each in leading), default=None),
        "committed": redis.committed,
        "lag_steps": max(lags, default=None),
        "lag_s": _lag_s(leading, redis.heartbeats, time_s),
        "term": plan.term if plan else None,
        "revision": plan.revision if plan else None,
        "phase": plan.phase.value if plan else None,
        "phase_s": max(0.0, time_s - zookeeper.plan_time_s) if plan and zookeeper.plan_time_s else None,
        "resumed_at": plan.resume if plan else None,
        "controller": zookeeper.controller,
        "samples_per_s": _sum(each["samples_per_s"] for each in workers),
        "loss": next((each["loss"] for each in workers if 0 in each["ranks"]), None),
        "servers": servers,
        "workers": workers,
        "missing": sorted(each["id"] for each in gone),
        "gone": gone,
        "unheld": _unheld(plan, living) if plan and not zookeeper.problem else [],
        "events": redis.events,
        "redis": _redis(redis),
        "zookeeper": _zookeeper(zookeeper),
    }
    document["state"] = _state(document)
    document["findings"] = [asdict(finding) for finding in diagnose(document)]
    return document


def _state(document: Mapping[str, Any]) -> str:
    if document["redis"]["problem"] or document["zookeeper"]["problem"]:
        return "not all is known"
    if not document["servers"] and not document["workers"]:
        return "at rest"
    if document["missing"]:
        return "recovering"
    return "running" if document["phase"] == Phase.RUN else "handing over"


# --- members


def _heart(age: HeartbeatAge, now_s: float) -> dict[str, float]:
    return {
        "heartbeat_age_s": round(max(0.0, age.age_s) + now_s - age.seen_s, 3),
        "clock_ahead_s": round(max(0.0, -age.age_s), 3),
    }


_SILENT: Mapping[str, Any] = {"heartbeat_age_s": None, "clock_ahead_s": None}


def _seen(
    zookeeper: ZooKeeperView, heartbeats: Mapping[str, RawHeartbeat], hearts: Hearts
) -> tuple[list[_Entry], list[_Entry]]:
    """Servers and workers as ZooKeeper knows them."""
    plan = zookeeper.plan
    servers = [
        _server(
            member,
            len(plan.shards_of(member.id)) if plan else 0,
            zookeeper.answers.get(member.id, _NOBODY_ASKED),
            plan,
            heartbeats.get(member.id, {}),
            hearts.get(member.id, _SILENT),
        )
        for member in sorted(zookeeper.servers, key=lambda each: each.id)
    ]
    workers = [
        _worker(
            member,
            list(plan.ranks_of(member.id)) if plan else [],
            heartbeats.get(member.id, {}),
            hearts.get(member.id, _SILENT),
        )
        for member in sorted(zookeeper.workers, key=lambda each: each.id)
    ]
    return servers, workers


def _heard_of(heartbeats: Mapping[str, RawHeartbeat], hearts: Hearts) -> tuple[list[_Entry], list[_Entry]]:
    """The same of which we know by their heartbeats only."""
    servers, workers = [], []
    for name, heart in sorted(hearts.items()):
        if heart["heartbeat_age_s"] > _HEARTBEAT_SHOWN_S:
            continue
        heartbeat = heartbeats[name]
        member = Member(name, _text(heartbeat.get("host")), int(_number(heartbeat.get("pid")) or 0))
        if heartbeat.get("role") == "server":
            metrics = _mapping(heartbeat.get("metrics"))
            answer = {
                "version": _whole(metrics.get("version")),
                "committed": _whole(metrics.get("committed_version")),
                "stage": _text(heartbeat.get("stage")),
                "sick": "",
            }
            servers.append(_server(member, _whole(heartbeat.get("shards")) or 0, answer, None, heartbeat, heart))
        elif heartbeat.get("role") == "worker":
            ranks = heartbeat.get("ranks")
            held = [rank for rank in ranks if isinstance(rank, int)] if isinstance(ranks, list) else []
            workers.append(_worker(member, held, heartbeat, heart))
    return servers, workers


def _server(
    member: Member,
    shards: int,
    answer: Mapping[str, Any],
    plan: Plan | None,
    heartbeat: RawHeartbeat,
    heart: Mapping[str, Any],
) -> _Entry:
    known = answer["version"] is not None and answer["committed"] is not None
    return {
        "id": member.id,
        "host": member.host,
        "pid": member.pid,
        "address": member.address,
        "endpoint": _text(heartbeat.get("endpoint")),
        "leaving": member.leaving,
        "awaited": bool(shards) and plan is not None and _is_awaited(member, plan),
        "cannot_serve": plan is not None and member.reload_term == plan.term,
        "shards": shards,
        **answer,
        "lag": answer["version"] - answer["committed"] if known else None,
        "resident_bytes": _number(heartbeat.get("resident_bytes")),
        **heart,
    }


def _is_awaited(member: Member, plan: Plan) -> bool:
    match plan.phase:
        case Phase.FREEZE:
            return member.frozen_revision != plan.freeze_revision
        case Phase.STOP:
            return member.stopped_version != plan.stop_version
    return False


def _worker(member: Member, ranks: list[int], heartbeat: RawHeartbeat, heart: Mapping[str, Any]) -> _Entry:
    rates, metrics = _mapping(heartbeat.get("rates")), _mapping(heartbeat.get("metrics"))
    return {
        "id": member.id,
        "host": member.host,
        "pid": member.pid,
        "endpoint": _text(heartbeat.get("endpoint")),
        "ranks": ranks,
        "step": _whole(metrics.get("step")),
        "compute_s": _ratio(metrics.get("compute_seconds"), metrics.get("steps")),
        "steps_per_s": _number(rates.get("steps")),
        "samples_per_s": _number(rates.get("samples")),
        "stage": _text(heartbeat.get("stage")),
        "loss": _number(metrics.get("loss")),
        "resident_bytes": _number(heartbeat.get("resident_bytes")),
        **heart,
    }


def _step_now(worker: _Entry) -> float:
    """Where it is by now, as its heartbeat is up to a second old: else who told last would seem to be the fastest."""
    rate = (worker["steps_per_s"] or 0.0) / len(worker["ranks"])
    return float(worker["step"] + min(worker["heartbeat_age_s"] or 0.0, _HEARTBEAT_EVERY_S) * rate)


# --- the plan against who is there


def _gone(plan: Plan | None, living: set[str]) -> list[dict[str, Any]]:
    """Members that the plan names but that are gone."""
    if plan is None:
        return []
    servers = [
        {"id": each.id, "role": "server", "host": each.host, "shards": len(plan.shards_of(each.id)), "ranks": []}
        for each in plan.servers
        if each.id not in living
    ]
    workers = [
        {"id": each, "role": "worker", "host": "", "shards": 0, "ranks": list(plan.ranks_of(each))}
        for each in sorted(set(plan.ranks) - living - {""})
    ]
    return servers + workers


def _unheld(plan: Plan, living: set[str]) -> list[int]:
    return [rank for rank, holder in enumerate(plan.ranks) if holder not in living]


def _lag_s(leading: Sequence[Mapping[str, Any]], heartbeats: Mapping[str, RawHeartbeat], time_s: float) -> float | None:
    """For how long the least durable server has committed nothing, while it has what could be."""
    ages = []
    for server in leading:
        if server["lag"] == 0:
            ages.append(0.0)
            continue
        committed_s = _number(_mapping(heartbeats.get(server["id"], {}).get("metrics")).get("committed_time_seconds"))
        if committed_s:
            ages.append(max(0.0, time_s - committed_s))
    return max(ages, default=None)


# --- the dependencies


def _redis(view: RedisView) -> dict[str, Any]:
    facts = view.facts
    found: dict[str, Any] = {"where": view.where, "problem": view.problem, "damage": view.damage}
    if facts is None:
        unknown = ("latency_s", "used_bytes", "limit_bytes", "persistence", "cannot_persist", "run_id")
        return found | dict.fromkeys(unknown)
    limits = [limit for limit in (facts.memory_limit_bytes, facts.system_memory_bytes) if limit > 0]
    return found | {
        "latency_s": facts.round_trip_s,
        "used_bytes": facts.used_memory_bytes,
        "limit_bytes": min(limits, default=None),
        "persistence": _persistence(facts),
        "cannot_persist": facts.cannot_persist,
        "run_id": facts.run_id,
    }


def _persistence(facts: RedisFacts) -> str:
    if facts.appends:
        return f"appendonly, appendfsync {facts.appendfsync or 'not told'}"
    if facts.save is None:
        return "no log; snapshots not told"
    return f"snapshots only (save {facts.save})" if facts.save else "none"


def _zookeeper(view: ZooKeeperView) -> dict[str, Any]:
    return {
        "hosts": view.hosts,
        "problem": view.problem,
        "server": view.server,
        "latency_s": view.latency_s,
        "session_timeout_s": view.session_timeout_s,
        "members": [{"address": each.address, "mode": each.mode, "problem": each.problem} for each in view.members],
    }


# --- what stands in a heartbeat


def _number(value: object) -> float | None:
    """JSON has no NaN, and this document must be JSON."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _ratio(amount: object, count: object) -> float | None:
    whole, parts = _number(amount), _number(count)
    return whole / parts if whole is not None and parts else None


def _whole(value: object) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
