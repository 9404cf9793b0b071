"""`psa status`: one look at ZooKeeper and Redis, printed as tables or as JSON."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

from rich.console import Console
from rich.table import Table

from psa_store.config import Settings
from psa_store.errors import UnknownJob
from psa_store.local import fill_addresses
from psa_store.status import describe
from psa_store.storage import RedisStore


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
        f"mode {document['mode']}, {document['ranks']} ranks, {document['shards']} shards, "
        f"{document['bytes'] / 1e6:.1f} MB"
    )
    for gone in document["missing"]:
        console.print(f"[red]gone[/]: {gone} (the controller is replacing it)")
    servers = Table("server", "pid", "address", "shards", "version", "not yet committed", "")
    for each in sorted(document["servers"], key=lambda server: not server["sick"]):
        marks = [f"[red]{each['sick']}[/]"] if each["sick"] else []
        marks += ["controller"] if each["id"] == document["controller"] else []
        marks += ["leaving"] if each["leaving"] else []
        lag = "-" if each["version"] is None else f"{each['version'] - each['committed']} versions"
        cells = (each["id"], each["pid"], each["address"], each["shards"], each["version"], lag, ", ".join(marks))
        servers.add_row(*map(str, cells))
    if document["servers"]:
        console.print(servers)
    workers = Table("worker", "pid", "ranks")
    for each in document["workers"]:
        workers.add_row(each["id"], str(each["pid"]), ", ".join(map(str, each["ranks"])) or "standby")
    if document["workers"]:
        console.print(workers)
