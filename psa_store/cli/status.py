"""`psa status`: one look at ZooKeeper and Redis, printed as tables or as JSON."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from typing import Any

from rich.console import Console
from rich.table import Table

from psa_store.config import Settings
from psa_store.coordination import Coordination, MemberKind
from psa_store.errors import Disconnected, UnknownJob
from psa_store.job import job_config_from_json
from psa_store.layout import layout_from_json
from psa_store.local import fill_addresses
from psa_store.plan import Member, Plan, member_from_json, newest_common, plan_from_json
from psa_store.storage import RedisStore
from psa_store.wire import inspect

_ANSWER_S = 1.0


def show(job: str | None, as_json: bool, settings: Settings) -> None:
    """Print the state of a job, or the list of jobs.

    Raises:
        UnknownJob: there is no such job; the message lists those that exist.
        DependencyUnreachable: Redis or ZooKeeper does not answer, or none is known.
    """
    settings = fill_addresses(settings)
    assert settings.redis is not None
    with closing(RedisStore(settings.redis, timeout_s=settings.connect_timeout_s)) as store:
        jobs = sorted(store.jobs())
        if job is not None and job not in jobs:
            raise UnknownJob(f"no job {job!r}; known jobs: {', '.join(jobs) or 'none'}")
        documents = [describe(each, settings, store) for each in ([job] if job else jobs)]
    if as_json:
        print(json.dumps(documents[0] if job else documents, indent=1))
    elif job is None:
        Console().print(_overview(documents))
    else:
        _details(Console(), documents[0])


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


def _overview(documents: list[dict[str, Any]]) -> Table:
    table = Table("job", "committed", "epoch", "servers", "workers", "state")
    for each in documents:
        table.add_row(
            each["job"],
            str(each["committed"]),
            str(each["epoch"] or "-"),
            str(len(each["servers"])),
            str(len(each["workers"])),
            _state(each),
        )
    return table


def _state(document: dict[str, Any]) -> str:
    if not document["servers"] and not document["workers"]:
        return "at rest"
    if document["missing"]:
        return "recovering"
    return "running" if document["phase"] == "run" else "handing over"


def _details(console: Console, document: dict[str, Any]) -> None:
    console.print(
        f"job [bold]{document['job']}[/]: {_state(document)}, committed version {document['committed']}, "
        f"epoch {document['epoch'] or '-'} (since version {document['resumed_at']}), "
        f"{document['ranks']} ranks, {document['shards']} shards, {document['bytes'] / 1e6:.1f} MB"
    )
    for gone in document["missing"]:
        console.print(f"[red]gone[/]: {gone} (the controller is replacing it)")
    servers = Table("server", "pid", "address", "shards", "version", "not yet committed", "")
    for each in sorted(document["servers"], key=lambda server: not server["sick"]):
        marks = [f"[red]{each['sick']}[/]"] if each["sick"] else []
        marks += ["controller"] if each["id"] == document["controller"] else []
        marks += ["leaving"] if each["leaving"] else []
        lag = "-" if each["version"] is None else f"{each['version'] - each['committed']} steps"
        cells = (each["id"], each["pid"], each["address"], each["shards"], each["version"], lag, ", ".join(marks))
        servers.add_row(*map(str, cells))
    if document["servers"]:
        console.print(servers)
    workers = Table("worker", "pid", "ranks")
    for each in document["workers"]:
        workers.add_row(each["id"], str(each["pid"]), ", ".join(map(str, each["ranks"])) or "standby")
    if document["workers"]:
        console.print(workers)
