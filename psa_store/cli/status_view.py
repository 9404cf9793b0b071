"""The status of jobs as `psa status` shows it. Text and not markup: names and addresses may hold brackets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from psa_store.observe.events import Event
from psa_store.observe.formatting import (
    UNKNOWN,
    cells,
    clock,
    host_name,
    milliseconds,
    model_parts,
    ranks,
    seconds,
    size,
    whole,
)
from psa_store.observe.status.model import (
    Finding,
    JobStatus,
    MemberStatus,
    RedisStatus,
    ServerStatus,
    Severity,
    WorkerStatus,
    ZooKeeperStatus,
)

_STYLES = {Severity.SICK: "bold white on red", Severity.WARN: "black on yellow"}
_WIDE = 100
"""Columns of a terminal on which everything fits."""

_WAIT_SHOWN_S = 1.0

Row = TypeVar("Row", contravariant=True)
M = TypeVar("M", bound=MemberStatus)


@dataclass(frozen=True, slots=True)
class _Column(Generic[Row]):
    title: str
    cell: Callable[[Row], str]
    always: bool = True
    """Whether there is room for it on narrow terminals as well."""


def overview(found: Sequence[JobStatus], width: int) -> RenderableType:
    """All jobs, one line each; above them the worst finding of each. ``width``: of the terminal."""
    if not found:
        return Text("no jobs yet")
    by_need = sorted(found, key=lambda each: (-len(each.findings), each.job))
    columns = [column for column in _JOBS if column.always or width >= _WIDE]
    table = _table(*(column.title for column in columns))
    for column in table.columns[1:]:
        column.no_wrap = True
    # Where there is no room, long names go on in a next line: no other cell may be cut for them.
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for each in by_need:
        table.add_row(*(Text(column.cell(each)) for column in columns))
    return Group(*(_first_finding(each) for each in by_need if each.findings), table)


def job_view(status: JobStatus, width: int) -> RenderableType:
    """One job: what is not well, what it does, its members, and what it stands on. ``width``: of the terminal."""
    parts: list[RenderableType] = [Text("job ").append(f"{status.job}: {status.state}", style="bold")]
    parts += [finding_view(each) for each in status.findings]
    parts.append(_numbers(status))
    marked = {each.member for each in status.findings if each.member}
    if status.servers:
        notes: _Column[ServerStatus] = _Column("", lambda server: _notes(server, status.controller))
        parts.append(_members((*_SERVERS, notes), status.servers, marked, width))
    if status.workers:
        parts.append(_members(_WORKERS if status.stages == 1 else _STAGED_WORKERS, status.workers, marked, width))
    parts += [_redis(status.redis), _zookeeper(status.zookeeper)]
    parts += [_event(each) for each in status.events]
    return Group(*parts)


def finding_view(finding: Finding) -> Text:
    line = _finding_line(finding)
    if finding.where:
        line.append(f" [{finding.where}]")
    return line.append(f"\n       → {finding.look}", style="bold")


def _first_finding(status: JobStatus) -> Text:
    line = _finding_line(status.findings[0])
    more = f" and {len(status.findings) - 1} more" if len(status.findings) > 1 else ""
    line.append(f"{more}\n       → psa status {status.job}", style="bold")
    return Text(f"job {status.job}: ").append(line)


def _finding_line(finding: Finding) -> Text:
    line = Text().append(f" {finding.severity.upper()} ", style=_STYLES[finding.severity])
    return line.append(f" {finding.what}")


def _numbers(status: JobStatus) -> Text:
    late = f", {seconds(status.lag_s)}" if status.lag_s is not None else ""
    lag = f" ({status.lag_steps} versions{late} not durable)" if status.lag_steps else ""
    doing = [
        f"version {whole(status.version)}, committed version {whole(status.committed)}{lag}",
        f"{whole(status.samples_per_s)} samples/s",
        f"loss {UNKNOWN}" if status.loss is None else f"loss {status.loss:.4f}",
        *(f"{name} {value:.4g}" for name, value in sorted(status.metrics.items())),
        f"term {whole(status.term)} since version {whole(status.resumed_at)}",
        f"controller {status.controller or UNKNOWN}",
        *([f"{status.set_aside_count} documents set aside"] if status.set_aside_count else []),
    ]
    numbers = Text(", ".join(doing))
    for each in status.servers:
        if each.id == status.controller and each.endpoint:
            numbers.append(f"\npage http://{each.endpoint}")
    if status.ranks is not None:
        parts = model_parts(status.stages, status.microbatches)
        facts = f"mode {status.mode}, {status.ranks} ranks, {f'{parts}, ' if parts else ''}{status.shards} shards, "
        facts += f"{size(status.bytes)}, commits every {status.commit_every} steps"
        facts += "".join(f"\nfrom step {each.step} on {each.numbers}" for each in status.changes)
        numbers.append(f"\n{facts}", style="dim")
    return numbers


_JOBS: Sequence[_Column[JobStatus]] = (
    _Column("job", lambda each: each.job),
    _Column("state", lambda each: each.state),
    _Column("version", lambda each: whole(each.version), always=False),
    _Column("committed", lambda each: whole(each.committed)),
    _Column("term", lambda each: whole(each.term), always=False),
    _Column("servers", lambda each: str(len(each.servers))),
    _Column("workers", lambda each: str(len(each.workers))),
    _Column("samples/s", lambda each: whole(each.samples_per_s), always=False),
)
_MEMBER: Sequence[_Column[MemberStatus]] = (
    _Column("host", lambda each: host_name(each.host), always=False),
    _Column("pid", lambda each: str(each.pid), always=False),
)
_PROCESS: Sequence[_Column[MemberStatus]] = (
    _Column("stage", lambda each: each.stage or UNKNOWN, always=False),
    _Column("memory", lambda each: size(each.resident_bytes), always=False),
    _Column("heartbeat", lambda each: seconds(each.heartbeat_age_s)),
)
_SERVERS: Sequence[_Column[ServerStatus]] = (
    _Column("server", lambda each: each.id),
    *_MEMBER,
    _Column("shards", lambda each: str(each.shards)),
    _Column("version", lambda each: whole(each.version)),
    _Column("lag", lambda each: whole(each.lag)),
    *_PROCESS,
)
_STEPS: Sequence[_Column[WorkerStatus]] = (
    _Column("step", lambda each: whole(each.step)),
    _Column("behind", lambda each: whole(each.behind)),
    _Column("samples/s", lambda each: whole(each.samples_per_s)),
)
_WORKERS: Sequence[_Column[WorkerStatus]] = (
    _Column("worker", lambda each: each.id),
    *_MEMBER,
    _Column("ranks", lambda each: ranks(each.ranks) or "standby"),
    *_STEPS,
    *_PROCESS,
)
_STAGED_WORKERS: Sequence[_Column[WorkerStatus]] = (
    _Column("worker", lambda each: each.id),
    *_MEMBER,
    _Column("computes", lambda each: cells(each.cells) or "standby"),
    *_STEPS,
    _Column("does", lambda each: _doing(each)),
    *_PROCESS[1:],
)
"""Of a model in stages, so what a process does is not called its stage."""


def _members(columns: Sequence[_Column[M]], members: Sequence[M], marked: set[str], width: int) -> Table:
    """One row each; those that a finding is about come first."""
    shown = [column for column in columns if column.always or width >= _WIDE]
    table = _table(*(column.title for column in shown))
    for each in sorted(members, key=lambda member: member.id not in marked):
        table.add_row(*(Text(column.cell(each)) for column in shown), style="red" if each.id in marked else "")
    return table


def _doing(worker: WorkerStatus) -> str:
    if not worker.waits_for:
        return worker.stage or UNKNOWN
    long = worker.waits_s is not None and worker.waits_s >= _WAIT_SHOWN_S
    return f"waits for {cells(worker.waits_for)}{f', {seconds(worker.waits_s)}' if long else ''}"


def _notes(server: ServerStatus, controller: str | None) -> str:
    found = ["controller"] if server.id == controller else []
    found += ["leaving"] if server.leaving else []
    found += ["does not answer"] if server.problem else []
    return ", ".join(found)


def _redis(redis: RedisStatus) -> Text:
    line = Text("Redis      ").append(redis.where)
    if redis.latency_s is None:
        return line.append(": does not answer", style="red")
    limit = f" of {size(redis.limit_bytes)}" if redis.limit_bytes else ""
    line.append(f": {milliseconds(redis.latency_s)}, {size(redis.used_bytes)}{limit}, ")
    line.append(f"persistence: {redis.persistence}, run {(redis.run_id or UNKNOWN)[:8]}")
    if redis.replicas_acknowledge:
        newest = UNKNOWN if redis.replicas_acknowledged is None else str(redis.replicas_acknowledged)
        line.append(f", durable at {newest} of {redis.replicas} replicas ({redis.replicas_acknowledge} wanted)")
    return line


def _zookeeper(zookeeper: ZooKeeperStatus) -> Text:
    line = Text("ZooKeeper  ").append(zookeeper.server or zookeeper.hosts)
    if zookeeper.problem or zookeeper.latency_s is None:
        line.append(": does not answer", style="red")
    else:
        line.append(f": {milliseconds(zookeeper.latency_s)}")
    serving = [each for each in zookeeper.members if not each.problem]
    line.append(f", {len(serving)} of {len(zookeeper.members)} serve")
    modes = sorted(each.mode for each in serving if each.mode)
    return line.append(f" ({', '.join(modes)})" if modes else "")


def _event(event: Event) -> Text:
    return Text(f"{clock(event.time)}  {event.kind}: {event.text}", style="dim")


def _table(*columns: str) -> Table:
    """Without lines between columns, so that more fits; the first column, a name to copy, is never cut."""
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[0].overflow = "ignore"
    return table
