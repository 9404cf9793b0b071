"""What `psa status` shows of the documents of a look. Text and not markup: names and addresses may hold brackets."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_STYLES = {"sick": "bold white on red", "warn": "black on yellow"}
_NOTHING = "-"

Document = Mapping[str, Any]


def overview(documents: Sequence[Document]) -> RenderableType:
    """All jobs, one line each; those that are sick first."""
    table = _table("job", "state", "version", "committed", "epoch", "servers", "workers", "samples/s", "")
    for each in sorted(documents, key=lambda each: (-len(each["findings"]), each["job"])):
        findings = each["findings"]
        first = _finding_line(findings[0]) if findings else Text("")
        if len(findings) > 1:
            first.append(f" and {len(findings) - 1} more")
        table.add_row(
            *map(Text, (each["job"], each["state"], _whole(each["version"]), _whole(each["committed"]))),
            _whole(each["epoch"]),
            str(len(each["servers"])),
            str(len(each["workers"])),
            _whole(each["samples_per_s"]),
            first,
        )
    return table if documents else Text("no jobs yet")


def job_view(document: Document) -> RenderableType:
    """One job: what is sick, what it does, who does it, and on what it stands."""
    parts: list[RenderableType] = [_title(document)]
    parts += [_finding(each) for each in document["findings"]]
    marked = {each["member"] for each in document["findings"] if each["member"]}
    if document["servers"]:
        parts.append(_servers(document, marked))
    if document["workers"]:
        parts.append(_workers(document, marked))
    parts += [_redis(document["redis"]), _zookeeper(document["zookeeper"])]
    parts += [_event(each) for each in document["events"]]
    return Group(*parts)


def apology(why: str) -> RenderableType:
    """Nothing can be shown at all."""
    return _finding({"severity": "sick", "what": why, "where": "", "look": "psa doctor", "member": ""})


def _title(document: Document) -> Text:
    title = Text("job ")
    title.append(document["job"], style="bold")
    title.append(f": {document['state']}", style="bold")
    title.append(f", version {_whole(document['version'])}, committed version {_whole(document['committed'])}")
    if document["lag_steps"]:
        late = "" if document["lag_s"] is None else f", {document['lag_s']:.1f} s"
        title.append(f" ({document['lag_steps']} versions{late} not durable)")
    title.append(f", epoch {_whole(document['epoch'])} (since version {_whole(document['resumed_at'])})")
    title.append(f", controller {document['controller'] or _NOTHING}")
    if document["samples_per_s"] is not None:
        title.append(f", {_whole(document['samples_per_s'])} samples/s", style="bold")
    if document["loss"] is not None:
        title.append(f", loss {document['loss']:.4f}", style="bold")
    facts = [f"mode {document['mode']}", f"{document['ranks']} ranks", f"{document['shards']} shards"]
    if document["bytes"] is not None:
        facts.append(_megabytes(document["bytes"]))
    if document["ranks"] is not None:
        facts.append(f"commits every {document['commit_every']} steps")
        title.append("\n" + ", ".join(facts))
    return title


def _finding_line(finding: Mapping[str, Any]) -> Text:
    line = Text()
    line.append(f" {finding['severity'].upper()} ", style=_STYLES[finding["severity"]])
    line.append(f" {finding['what']}")
    return line


def _finding(finding: Mapping[str, Any]) -> Text:
    line = _finding_line(finding)
    if finding["where"]:
        line.append(f" [{finding['where']}]")
    line.append(f"\n       → {finding['look']}", style="bold")
    return line


def _servers(document: Document, marked: set[str]) -> Table:
    table = _table("server", "host", "pid", "shards", "version", "lag", "stage", "memory", "heartbeat", "")
    for each in sorted(document["servers"], key=lambda server: server["id"] not in marked):
        notes = ["controller"] if each["id"] == document["controller"] else []
        notes += ["leaving"] if each["leaving"] else []
        notes += ["does not answer"] if each["sick"] else []
        table.add_row(
            *map(Text, (each["id"], _host(each["host"]), str(each["pid"]), str(each["shards"]))),
            *map(Text, (_whole(each["version"]), _whole(each["lag"]), each["stage"] or _NOTHING)),
            *map(Text, (_megabytes(each["resident_bytes"]), _ago(each["heartbeat_age_s"]), ", ".join(notes))),
            style="red" if each["id"] in marked else "",
        )
    return table


def _workers(document: Document, marked: set[str]) -> Table:
    table = _table("worker", "host", "pid", "ranks", "step", "behind", "samples/s", "stage", "memory", "heartbeat")
    for each in sorted(document["workers"], key=lambda worker: worker["id"] not in marked):
        table.add_row(
            *map(Text, (each["id"], _host(each["host"]), str(each["pid"]), _ranks(each["ranks"]))),
            *map(Text, (_whole(each["step"]), _whole(each["behind"]), _whole(each["samples_per_s"]))),
            *map(Text, (each["stage"] or _NOTHING, _megabytes(each["resident_bytes"]), _ago(each["heartbeat_age_s"]))),
            style="red" if each["id"] in marked else "",
        )
    return table


def _redis(redis: Mapping[str, Any]) -> Text:
    line = Text("Redis      ")
    line.append(redis["where"])
    if redis["latency_s"] is None:
        return line.append(": does not answer", style="red")
    limit = f" of {_megabytes(redis['limit_bytes'])}" if redis["limit_bytes"] else ""
    line.append(f": {redis['latency_s'] * 1e3:.1f} ms, {_megabytes(redis['used_bytes'])}{limit}, ")
    return line.append(f"persistence: {redis['persistence']}, run {redis['run_id'][:8]}")


def _zookeeper(zookeeper: Mapping[str, Any]) -> Text:
    line = Text("ZooKeeper  ")
    line.append(str(zookeeper["server"] or zookeeper["hosts"]))
    if zookeeper["problem"]:
        line.append(": does not answer", style="red")
    else:
        line.append(f": {zookeeper['latency_s'] * 1e3:.1f} ms")
    members = zookeeper["members"]
    serving = [each for each in members if not each["problem"]]
    line.append(f", {len(serving)} of {len(members)} serve")
    modes = sorted(each["mode"] for each in serving if each["mode"])
    return line.append(f" ({', '.join(modes)})" if modes else "")


def _event(event: Mapping[str, Any]) -> Text:
    moment = event.get("time")
    clock = time.strftime("%H:%M:%S", time.localtime(moment)) if isinstance(moment, (int, float)) else "?"
    return Text(f"{clock}  {event.get('kind', '?')}: {event.get('text', '')}", style="dim")


def _table(*columns: str) -> Table:
    """Without lines between columns, so that more fits; the first column, a name to copy, is never cut."""
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[0].overflow = "ignore"
    return table


def _whole(number: float | None) -> str:
    return _NOTHING if number is None else f"{number:.0f}"


def _megabytes(count: float | None) -> str:
    return _NOTHING if count is None else f"{count / 1e6:.{1 if count < 1e8 else 0}f} MB"


def _ago(age_s: float | None) -> str:
    return _NOTHING if age_s is None else f"{age_s:.1f} s"


def _ranks(ranks: Sequence[int]) -> str:
    """Runs of ranks as 0-3: a worker may hold hundreds."""
    if not ranks:
        return "standby"
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _host(identity: str) -> str:
    return identity.partition("/")[0]
