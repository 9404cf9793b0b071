"""What is sick about a job, read off the document of one look, with the command that looks further.

One rule, one function; each is given the document (see ``Observer.look``) and yields what it found. A sick thing hides
no other: who reads them decides. Pure: no I/O, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Document = Mapping[str, Any]

HEARTBEAT_S = 3.0
"""A process tells of itself once a second. Two may be lost to a Redis that hesitates."""
STEP_LONG_S = 2.0
"""Rates are those of the last seconds: where a step takes as long, to make none in that time is nothing unusual."""
HAND_OVER_SLOW_S = 10.0
MEMORY_FULL_SHARE = 0.9
REDIS_SLOW_S = 0.1
ZOOKEEPER_SLOW_SHARE = 1 / 40
"""Of the session timeout, as for `psa doctor`."""
CLOCK_SKEW_S = 3.0
_NAMED_MAX = 6
"""Ranks or members that a sentence names before it counts the others."""


class Severity(StrEnum):
    """SICK: training stands still, or what it made is at risk. WARN: it goes on, but somebody should know."""

    SICK = "sick"
    WARN = "warn"


@dataclass(frozen=True, slots=True)
class Finding:
    """``look``: a command that looks further, and on which host. ``member``: whom it is about, empty if nobody."""

    severity: Severity
    what: str
    where: str
    look: str
    member: str = ""


def diagnose(document: Document) -> list[Finding]:
    """All that is sick, the worst first; dependencies before members, for they make members sick."""
    found = [finding for rule in _RULES for finding in rule(document)]
    return sorted(found, key=lambda finding: list(Severity).index(finding.severity))


# --- Redis and ZooKeeper


def _redis(document: Document) -> Iterator[Finding]:
    redis, look = document["redis"], _doctor(document)
    if redis["problem"]:
        yield Finding(Severity.SICK, redis["problem"], redis["where"], look)
    if redis["damage"]:
        yield Finding(Severity.SICK, redis["damage"], redis["where"], look)
    if redis["cannot_persist"]:
        what = "Redis cannot write to its disk: it refuses commits, or would forget them when it dies"
        yield Finding(Severity.SICK, what, redis["where"], look)
    used, limit = redis["used_bytes"], redis["limit_bytes"]
    if used is not None and limit and used > MEMORY_FULL_SHARE * limit:
        what = f"the memory of Redis is nearly full: {used / 1e6:.0f} of {limit / 1e6:.0f} MB; commits will be refused"
        yield Finding(Severity.WARN, what, redis["where"], look)
    if redis["latency_s"] is not None and redis["latency_s"] > REDIS_SLOW_S:
        what = f"Redis is slow: {redis['latency_s'] * 1e3:.0f} ms to answer"
        yield Finding(Severity.WARN, what, redis["where"], look)


def _zookeeper(document: Document) -> Iterator[Finding]:
    zookeeper, look = document["zookeeper"], _doctor(document)
    if zookeeper["problem"]:
        yield Finding(Severity.SICK, zookeeper["problem"], zookeeper["hosts"], look)
    away = [member for member in zookeeper["members"] if member["problem"]]
    if away and not zookeeper["problem"]:
        for member in away:
            serving = len(zookeeper["members"]) - len(away)
            what = (
                f"a ZooKeeper member does not serve ({member['problem']}); {serving} of {len(zookeeper['members'])} do"
            )
            yield Finding(Severity.WARN, what, member["address"], look)
    latency_s, timeout_s = zookeeper["latency_s"], zookeeper["session_timeout_s"]
    if latency_s is not None and latency_s > timeout_s * ZOOKEEPER_SLOW_SHARE:
        what = f"ZooKeeper is slow: {latency_s * 1e3:.0f} ms to its leader and back, with sessions of {timeout_s:g} s"
        yield Finding(Severity.WARN, what, str(zookeeper["server"] or zookeeper["hosts"]), look)


# --- who is there


def _gone(document: Document) -> Iterator[Finding]:
    if not document["servers"] and not document["workers"]:
        return  # at rest: the plan names who was there last
    for each in document["gone"]:
        if each["role"] == "server":
            after = "another will take over" if document["servers"] else "no other server is there to take over"
            what = f"server {each['id']} is gone with {_count(each['shards'], 'shard')}; {after}"
            look = _watch(document) if document["servers"] else _serve(document)
            yield Finding(Severity.SICK, what, _host(each["host"]), look, each["id"])
        else:
            what = f"worker {each['id']} is gone; its {_ranks(each['ranks'])} will go to others"
            yield Finding(Severity.WARN, what, "", _watch(document), each["id"])


def _unheld(document: Document) -> Iterator[Finding]:
    if not document["unheld"] or not document["servers"]:
        return
    what = f"{_ranks(document['unheld'])} without a worker: no step can be completed"
    look = _watch(document) if document["workers"] else "psa worker SCRIPT, or psa run SCRIPT"
    yield Finding(Severity.SICK, what, "", look)


def _no_server(document: Document) -> Iterator[Finding]:
    if document["workers"] and not document["servers"] and not document["zookeeper"]["problem"]:
        what = f"no server is there: {_count(len(document['workers']), 'worker')} cannot go on"
        yield Finding(Severity.SICK, what, "", _serve(document))


def _no_controller(document: Document) -> Iterator[Finding]:
    if document["servers"] and document["controller"] is None and not document["zookeeper"]["problem"]:
        what = "no server is elected controller: nobody would replace what dies"
        yield Finding(Severity.SICK, what, document["zookeeper"]["hosts"], _watch(document))


# --- members that are there, but not well


def _servers(document: Document) -> Iterator[Finding]:
    for server in document["servers"]:
        if server["sick"]:
            yield _of_member(server, Severity.SICK, f"server {server['id']} does not answer: {server['sick']}")
        elif _is_silent(server):
            what = (
                f"server {server['id']} answers, but its last heartbeat is {_age(server)} old: it cannot write to Redis"
            )
            yield _of_member(server, Severity.WARN, what)
        if server["cannot_serve"]:
            what = f"server {server['id']} cannot serve what it owns, and waits for a take-over"
            yield Finding(Severity.SICK, what, _where(server), _watch(document), server["id"])


def _silent_workers(document: Document) -> Iterator[Finding]:
    for worker in document["workers"]:
        if _is_silent(worker):
            what = f"worker {worker['id']} holds {_ranks(worker['ranks'])}" if worker["ranks"] else "a standby worker"
            what += f", but its last heartbeat is {_age(worker)} old: it is paused or cut off"
            yield _of_member(worker, Severity.SICK if worker["ranks"] else Severity.WARN, what)


def _idle_workers(document: Document) -> Iterator[Finding]:
    """Whoever computes and makes no steps, while others wait."""
    holding = [each for each in document["workers"] if each["ranks"] and not _is_silent(each)]
    waiting = [each for each in holding if each["stage"] == "waiting"]
    for worker in holding:
        if waiting and worker["stage"] == "computing" and worker["steps_per_s"] == 0:
            what = f"worker {worker['id']} ({_ranks(worker['ranks'])}) has made no step for seconds: it computes "
            what += f"{_step(worker)} while {_count(len(waiting), 'other')} wait"
            slow = worker["compute_s"] is not None and worker["compute_s"] > STEP_LONG_S
            what += f"; it takes {worker['compute_s']:.0f} s for one, on average" if slow else ""
            yield _of_member(worker, Severity.WARN if slow else Severity.SICK, what)


def _all_wait(document: Document) -> Iterator[Finding]:
    holding = [each for each in document["workers"] if each["ranks"]]
    if holding and all(each["stage"] == "waiting" and each["steps_per_s"] == 0 for each in holding):
        what = "all workers wait for servers, and no step is made"
        yield Finding(Severity.SICK, what, "", _watch(document))


def _clocks(document: Document) -> Iterator[Finding]:
    for member in (*document["servers"], *document["workers"]):
        if member["clock_ahead_s"] is not None and member["clock_ahead_s"] > CLOCK_SKEW_S:
            what = f"its clock is {member['clock_ahead_s']:.0f} s ahead of ours: ages shown here are wrong for it"
            look = f"on {_host(member['host'])}: chronyc tracking, or timedatectl"
            yield Finding(Severity.WARN, what, _where(member), look, member["id"])


# --- what the job does


def _lag(document: Document) -> Iterator[Finding]:
    interval = document["commit_interval"]
    for server in document["servers"]:
        if interval and server["lag"] is not None and server["lag"] > 2 * interval:
            what = f"server {server['id']} has {_count(server['lag'], 'version')} that are not durable, "
            what += f"more than twice the {interval} between commits: Redis does not keep up, or refuses"
            yield Finding(Severity.SICK, what, _where(server), _doctor(document), server["id"])


def _hand_over(document: Document) -> Iterator[Finding]:
    if document["phase"] in (None, "run") or (document["phase_s"] or 0.0) < HAND_OVER_SLOW_S:
        return
    awaited = [server for server in document["servers"] if server["awaited"]]
    for server in awaited:
        what = f"the hand-over ({document['phase']}) has waited {document['phase_s']:.0f} s for server {server['id']}"
        yield _of_member(server, Severity.WARN, what)
    if not awaited:
        what = f"the hand-over is in phase {document['phase']} for {document['phase_s']:.0f} s"
        yield Finding(Severity.WARN, what, "", _watch(document))


_RULES: Sequence[Callable[[Document], Iterator[Finding]]] = (
    _redis,
    _zookeeper,
    _servers,
    _silent_workers,
    _idle_workers,
    _gone,
    _no_server,
    _no_controller,
    _unheld,
    _lag,
    _all_wait,
    _hand_over,
    _clocks,
)
"""Who may be the cause before what may be its effect."""


# --- words


def _of_member(member: Mapping[str, Any], severity: Severity, what: str) -> Finding:
    look = f"on {_host(member['host'])}: ps -o pid,stat,etime,args -p {member['pid']}"
    return Finding(severity, what, _where(member), look, member["id"])


def _is_silent(member: Mapping[str, Any]) -> bool:
    return member["heartbeat_age_s"] is not None and member["heartbeat_age_s"] > HEARTBEAT_S


def _age(member: Mapping[str, Any]) -> str:
    return f"{member['heartbeat_age_s']:.0f} s"


def _step(worker: Mapping[str, Any]) -> str:
    return "a step" if worker["step"] is None else f"step {worker['step']}"


def _where(member: Mapping[str, Any]) -> str:
    return f"host {_host(member['host'])}, pid {member['pid']}"


def _host(identity: str) -> str:
    """Without the boot id that makes it unique."""
    return identity.partition("/")[0]


def _doctor(document: Document) -> str:
    return f"psa doctor {document['job']}"


def _watch(document: Document) -> str:
    return f"psa status {document['job']} --watch"


def _serve(document: Document) -> str:
    return f"psa server --job {document['job']}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_NAMED_MAX]))
    more = f" and {len(ranks) - _NAMED_MAX} more" if len(ranks) > _NAMED_MAX else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {named}{more}"
