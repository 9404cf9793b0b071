"""What a job does at this moment: one look at ZooKeeper, Redis and its servers, as plain data."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

from psa_store.config import Settings
from psa_store.coordination import Coordination, MemberKind
from psa_store.errors import Disconnected, UnknownJob
from psa_store.job import job_config_from_json
from psa_store.layout import layout_from_json
from psa_store.plan import Member, Plan, member_from_json, newest_common, plan_from_json
from psa_store.storage import RedisStore
from psa_store.wire import inspect

_ANSWER_S = 1.0


def describe(job: str, settings: Settings, store: RedisStore) -> dict[str, Any]:
    """Everything that is known about a job, as plain data."""
    found = store.read_job(job)
    if found is None:
        raise UnknownJob(f"no job {job!r}")
    config, layout = job_config_from_json(found[0]), layout_from_json(found[1])
    heads = store.heads(job, [shard.index for shard in layout.versioned])
    committed = newest_common({head.shard: [m.version for m in head.manifests] for head in heads})
    assert settings.zookeeper is not None
    coordination = Coordination(
        settings.zookeeper,
        job,
        session_timeout_s=settings.session_timeout_s,
        connect_timeout_s=settings.connect_timeout_s,
        wake=threading.Event().set,
    )
    with closing(coordination):
        coordination.start()
        seen = coordination.read_plan()
        plan = plan_from_json(seen.text) if seen else None
        servers, workers = (
            [member_from_json(text) for text in coordination.members(kind).values()]
            for kind in (MemberKind.SERVER, MemberKind.WORKER)
        )
        controller = coordination.elected()
    return {
        "job": job,
        "ranks": config.ranks,
        "seed": config.seed,
        "mode": str(config.mode),
        "compression": str(config.compression),
        "commit_every": config.commit_every,
        "shards": len(layout.shards),
        "bytes": layout.arena_bytes,
        "committed": committed,
        "epoch": plan.epoch if plan else None,
        "revision": plan.revision if plan else None,
        "phase": plan.phase.value if plan else None,
        "resumed_at": plan.resume if plan else None,
        "controller": controller,
        "servers": [
            {
                "id": member.id,
                "host": member.host,
                "pid": member.pid,
                "address": member.address,
                "leaving": member.leaving,
                "shards": len(plan.shards_of(member.id)) if plan else 0,
                **_ask(member),
            }
            for member in sorted(servers, key=lambda each: each.id)
        ],
        "workers": [
            {
                "id": member.id,
                "host": member.host,
                "pid": member.pid,
                "ranks": list(plan.ranks_of(member.id)) if plan else [],
            }
            for member in sorted(workers, key=lambda each: each.id)
        ],
        "missing": _missing(plan, {member.id for member in (*servers, *workers)}),
    }


def _ask(member: Member) -> dict[str, Any]:
    """What a server says of itself; ``sick`` says why, if it says nothing."""
    try:
        found = inspect(member.address, member.local, member.host, _ANSWER_S)
    except Disconnected as error:
        return {"version": None, "committed": None, "stage": None, "sick": str(error)}
    return {"version": found["version"], "committed": found["committed"], "stage": found["stage"], "sick": ""}


def _missing(plan: Plan | None, alive: set[str]) -> list[str]:
    """Members that the plan names but that are gone."""
    if plan is None:
        return []
    return sorted(({server.id for server in plan.servers} | set(plan.ranks)) - alive - {""})
