"""What `psa status` shows of the documents of a look. Text and not markup: names and addresses may hold brackets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_STYLES = {"sick": "bold white on red", "warn": "black on yellow"}
_NOTHING = "-"
_WIDE = 100
"""Columns of a terminal on which everything fits."""

Document = Mapping[str, Any]


def overview(documents: Sequence[Document], width: int) -> RenderableType:
    """All jobs, one line each; above them, of each that is sick, what is sickest. ``width``: of the terminal."""
    if not documents:
        return Text("no jobs yet")
    by_need = sorted(documents, key=lambda each: (-len(each["findings"]), each["job"]))
    columns = [column for column in _JOBS if column[2] or width >= _WIDE]
    table = _table(*(title for title, _, _ in columns))
    for column in table.columns[1:]:
        column.no_wrap = True
    # Where there is no room, long names go on in a next line: no other cell may be cut for them.
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for each in by_need:
        table.add_row(*(Text(cell(each)) for _, cell, _ in columns))
    return Group(*(_first_finding(each) for each in by_need if each["findings"]), table)


def _first_finding(document: Document) -> Text:
    findings = document["findings"]
    line = _finding_line(findings[0])
    more = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
    line.append(f"{more}\n       → psa status {document['job']}", style="bold")
    return Text(f"job {document['job']}: ").append(line)


def job_view(document: Document, width: int) -> RenderableType:
    """One job: what is sick, what it does, who does it, and on what it stands. ``width``: of the terminal."""
    parts: list[RenderableType] = [_headline(document)]
    parts += [_finding(each) for each in document["findings"]]
    parts.append(_numbers(document))
    marked = {each["member"] for each in document["findings"] if each["member"]}
    if document["servers"]:
        columns = (*_SERVERS, ("", _notes(document), True))
        parts.append(_members(columns, document["servers"], marked, width))
    if document["workers"]:
        parts.append(_members(_WORKERS, document["workers"], marked, width))
    parts += [_redis(document["redis"]), _zookeeper(document["zookeeper"])]
    parts += [_event(each) for each in document["events"]]
    return Group(*parts)


def apology(why: str) -> RenderableType:
    """Nothing can be shown at all."""
    return _finding({"severity": "sick", "what": why, "where": "", "look": "psa doctor", "member": ""})


def _headline(document: Document) -> Text:
    headline = Text("job ")
    headline.append(f"{document['job']}: {document['state']}", style="bold")
    return headline


def _numbers(document: Document) -> Text:
    late = f", {document['lag_s']:.1f} s" if document["lag_steps"] and document["lag_s"] is not None else ""
    lag = f" ({document['lag_steps']} versions{late} not durable)" if document["lag_steps"] else ""
    doing = [
        f"version {_whole(document['version'])}, committed version {_whole(document['committed'])}{lag}",
        f"{_whole(document['samples_per_s'])} samples/s",
        "loss -" if document["loss"] is None else f"loss {document['loss']:.4f}",
        f"term {_whole(document['term'])} since version {_whole(document['resumed_at'])}",
        f"controller {document['controller'] or _NOTHING}",
    ]
    numbers = Text(", ".join(doing))
    pages = [
        each["endpoint"] for each in document["servers"] if each["id"] == document["controller"] and each["endpoint"]
    ]
    numbers.append("".join(f"\npage http://{address}" for address in pages))
    if document["ranks"] is not None:
        facts = f"mode {document['mode']}, {document['ranks']} ranks, {document['shards']} shards, "
        facts += f"{_size(document['bytes'])}, commits every {document['commit_every']} steps"
        numbers.append(f"\n{facts}", style="dim")
    return numbers


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


Column = tuple[str, Callable[[Document], str], bool]
"""Title, cell, and whether there is room for it on narrow terminals as well."""

_JOBS: Sequence[Column] = (
    ("job", lambda each: each["job"], True),
    ("state", lambda each: each["state"], True),
    ("version", lambda each: _whole(each["version"]), False),
    ("committed", lambda each: _whole(each["committed"]), True),
    ("term", lambda each: _whole(each["term"]), False),
    ("servers", lambda each: str(len(each["servers"])), True),
    ("workers", lambda each: str(len(each["workers"])), True),
    ("samples/s", lambda each: _whole(each["samples_per_s"]), False),
)
_MEMBER: Sequence[Column] = (
    ("host", lambda each: _host(each["host"]), False),
    ("pid", lambda each: str(each["pid"]), False),
)
_PROCESS: Sequence[Column] = (
    ("stage", lambda each: each["stage"] or _NOTHING, False),
    ("memory", lambda each: _size(each["resident_bytes"]), False),
    ("heartbeat", lambda each: _seconds(each["heartbeat_age_s"]), True),
)
_SERVERS: Sequence[Column] = (
    ("server", lambda each: each["id"], True),
    *_MEMBER,
    ("shards", lambda each: str(each["shards"]), True),
    ("version", lambda each: _whole(each["version"]), True),
    ("lag", lambda each: _whole(each["lag"]), True),
    *_PROCESS,
)
_WORKERS: Sequence[Column] = (
    ("worker", lambda each: each["id"], True),
    *_MEMBER,
    ("ranks", lambda each: _ranks(each["ranks"]), True),
    ("step", lambda each: _whole(each["step"]), True),
    ("behind", lambda each: _whole(each["behind"]), True),
    ("samples/s", lambda each: _whole(each["samples_per_s"]), True),
    *_PROCESS,
)


def _members(columns: Sequence[Column], members: Sequence[Document], marked: set[str], width: int) -> Table:
    """One row each; those of whom something was found come first."""
    shown = [column for column in columns if column[2] or width >= _WIDE]
    table = _table(*(title for title, _, _ in shown))
    for each in sorted(members, key=lambda member: member["id"] not in marked):
        table.add_row(*(Text(cell(each)) for _, cell, _ in shown), style="red" if each["id"] in marked else "")
    return table


def _notes(document: Document) -> Callable[[Document], str]:
    def notes(server: Document) -> str:
        found = ["controller"] if server["id"] == document["controller"] else []
        found += ["leaving"] if server["leaving"] else []
        found += ["does not answer"] if server["sick"] else []
        return ", ".join(found)

    return notes


def _redis(redis: Mapping[str, Any]) -> Text:
    line = Text("Redis      ")
    line.append(redis["where"])
    if redis["latency_s"] is None:
        return line.append(": does not answer", style="red")
    limit = f" of {_size(redis['limit_bytes'])}" if redis["limit_bytes"] else ""
    line.append(f": {redis['latency_s'] * 1e3:.1f} ms, {_size(redis['used_bytes'])}{limit}, ")
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


def _size(count: float | None) -> str:
    if count is None:
        return _NOTHING
    factor, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if count >= pair[0]), (1e3, "kB"))
    return f"{count / factor:.1f} {unit}"


def _seconds(age_s: float | None) -> str:
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
