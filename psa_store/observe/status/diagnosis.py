"""What is not well in a job, read off its status, with the command that looks further.

One rule, one function; each takes the status and yields what it found. A finding hides no other: the reader decides.
Pure: no I/O, no threads, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from psa_store.cluster import Phase, ProcessRole
from psa_store.observe.formatting import cells, count, host_name, milliseconds, names, numbered, size
from psa_store.observe.health import COMPUTING, WAITING
from psa_store.observe.status.model import Finding, GoneMember, JobStatus, MemberStatus, Severity, WorkerStatus

HEARTBEAT_S = 3.0
"""A process writes its heartbeat once a second. Two may be lost to a Redis that hesitates."""
STEP_LONG_S = 2.0
"""Rates are those of the last seconds: where a step takes as long, to make none in that time is nothing unusual."""
HAND_OVER_SLOW_S = 10.0
MEMORY_FULL_SHARE = 0.9
REDIS_SLOW_S = 0.1
ZOOKEEPER_SLOW_SHARE = 1 / 40
"""Of the session timeout, as for `psa doctor`."""
CLOCK_SKEW_S = 3.0


def diagnose(status: JobStatus) -> list[Finding]:
    """All that is not well, the worst first; dependencies before members, for they make members sick."""
    found = [finding for rule in _RULES for finding in rule(status)]
    return sorted(found, key=lambda finding: list(Severity).index(finding.severity))


# --- Redis and ZooKeeper


def _redis(status: JobStatus) -> Iterator[Finding]:
    redis, look = status.redis, _doctor(status)
    if redis.problem:
        yield Finding(Severity.SICK, redis.problem, redis.where, look)
    if redis.damage:
        yield Finding(Severity.SICK, redis.damage, redis.where, look)
    if redis.cannot_persist:
        what = "Redis cannot write to its disk: it refuses commits, or would forget them when it dies"
        yield Finding(Severity.SICK, what, redis.where, look)
    used, limit = redis.used_bytes, redis.limit_bytes
    if used is not None and limit and used > MEMORY_FULL_SHARE * limit:
        what = f"the memory of Redis is nearly full: {size(used)} of {size(limit)}; commits will be refused"
        yield Finding(Severity.WARN, what, redis.where, look)
    if redis.latency_s is not None and redis.latency_s > REDIS_SLOW_S:
        what = f"Redis is slow: {milliseconds(redis.latency_s, 0)} to answer"
        yield Finding(Severity.WARN, what, redis.where, look)


def _zookeeper(status: JobStatus) -> Iterator[Finding]:
    zookeeper, look = status.zookeeper, _doctor(status)
    if zookeeper.problem:
        yield Finding(Severity.SICK, zookeeper.problem, zookeeper.hosts, look)
    away = [member for member in zookeeper.members if member.problem]
    if away and not zookeeper.problem:
        for member in away:
            serving = len(zookeeper.members) - len(away)
            what = f"a ZooKeeper member does not serve ({member.problem}); {serving} of {len(zookeeper.members)} do"
            yield Finding(Severity.WARN, what, member.address, look)
    latency_s, timeout_s = zookeeper.latency_s, zookeeper.session_timeout_s
    if latency_s is not None and latency_s > timeout_s * ZOOKEEPER_SLOW_SHARE:
        what = (
            f"ZooKeeper is slow: {milliseconds(latency_s, 0)} to its leader and back, with sessions of {timeout_s:g} s"
        )
        yield Finding(Severity.WARN, what, zookeeper.server or zookeeper.hosts, look)


def _set_aside(status: JobStatus) -> Iterator[Finding]:
    """What is needed is written again by a job that runs; what stays was never a part of it."""
    for each in status.set_aside:
        what = f"{each.where} can not be read, and is set aside: {each.why}"
        yield Finding(Severity.WARN, what, "", f"{_watch(status)}; if it stays, no process owns it: delete it")


# --- which members are there


def _gone(status: JobStatus) -> Iterator[Finding]:
    if not status.servers and not status.workers:
        return  # at rest: the plan names the last members
    for each in status.gone:
        if each.role is ProcessRole.SERVER:
            after = "another will take over" if status.servers else "no other server is there to take over"
            what = f"server {each.id} is gone with {count(each.shards, 'shard')}; {after}"
            look = _watch(status) if status.servers else _serve(status)
            yield Finding(Severity.SICK, what, host_name(each.host), look, each.id)
        else:
            what = f"worker {each.id} is gone; its {_held(each)} will go to others"
            yield Finding(Severity.WARN, what, "", _watch(status), each.id)


def _unheld(status: JobStatus) -> Iterator[Finding]:
    if not status.unheld or not status.servers:
        return
    unheld = cells(status.unheld_cells) or numbered("rank", status.unheld)
    what = f"{unheld} without a worker: no step can be completed"
    look = _watch(status) if status.workers else "psa worker SCRIPT, or psa run SCRIPT"
    yield Finding(Severity.SICK, what, "", look)


def _no_server(status: JobStatus) -> Iterator[Finding]:
    if status.workers and not status.servers and not status.zookeeper.problem:
        what = f"no server is there: {count(len(status.workers), 'worker')} cannot go on"
        yield Finding(Severity.SICK, what, "", _serve(status))


def _no_controller(status: JobStatus) -> Iterator[Finding]:
    if status.servers and status.controller is None and not status.zookeeper.problem:
        what = "no server is elected controller: what dies would not be replaced"
        yield Finding(Severity.SICK, what, status.zookeeper.hosts, _watch(status))


# --- members that are there, but not well


def _servers(status: JobStatus) -> Iterator[Finding]:
    for server in status.servers:
        if server.problem:
            yield _of_member(server, Severity.SICK, f"server {server.id} does not answer: {server.problem}")
        elif _is_silent(server):
            what = f"server {server.id} answers, but its last heartbeat is {_age(server)} old: it cannot write to Redis"
            yield _of_member(server, Severity.WARN, what)
        if server.cannot_serve:
            what = f"server {server.id} cannot serve what it owns, and waits for a take-over"
            yield Finding(Severity.SICK, what, _where(server), _watch(status), server.id)


def _silent_workers(status: JobStatus) -> Iterator[Finding]:
    for worker in status.workers:
        if _is_silent(worker):
            what = f"worker {worker.id} holds {_held(worker)}" if worker.ranks else "a standby worker"
            what += f", but its last heartbeat is {_age(worker)} old: it is paused or cut off"
            waiting = _waiting_for(worker, status)
            what += (
                f"; {names(each.id for each in waiting)} {'waits' if len(waiting) == 1 else 'wait'} for it"
                if waiting
                else ""
            )
            yield _of_member(worker, Severity.SICK if worker.ranks else Severity.WARN, what)


def _idle_workers(status: JobStatus) -> Iterator[Finding]:
    """A worker that computes and makes no steps, while others wait: with stages, one that they wait for, if there is
    such a one."""
    holding = [each for each in status.workers if each.ranks and not _is_silent(each)]
    waiting = [each for each in holding if each.stage == WAITING]
    idle = [each for each in holding if each.stage == COMPUTING and each.steps_per_s == 0] if waiting else []
    for worker in [each for each in idle if _waiting_for(each, status)] or idle:
        what = f"worker {worker.id} ({_held(worker)}) has made no step for seconds: it computes "
        step = "a step" if worker.step is None else f"step {worker.step}"
        what += f"{step} while {count(len(waiting), 'other')} wait"
        awaiting = _waiting_for(worker, status)
        what += f", {names(each.id for each in awaiting)} for it" if awaiting else ""
        slow = _step_s(worker) > STEP_LONG_S
        what += f"; it takes {_step_s(worker):.0f} s for one, on average" if slow else ""
        yield _of_member(worker, Severity.WARN if slow else Severity.SICK, what)


def _all_wait(status: JobStatus) -> Iterator[Finding]:
    holding = [each for each in status.workers if each.ranks]
    if not holding or not all(each.stage == WAITING and each.steps_per_s == 0 for each in holding):
        return
    for_cells = [each for each in holding if each.waits_for]
    if not for_cells:
        what = "all workers wait for servers, and no step is made"
        yield Finding(Severity.SICK, what, "", _watch(status))
    elif all((each.waits_s or 0.0) > max(STEP_LONG_S, 2 * _step_s(each)) for each in for_cells):
        first = for_cells[0]
        what = f"all workers wait, {first.id} for {cells(first.waits_for)}, and no step is made"
        yield Finding(Severity.SICK, what, "", _watch(status))


def _held_up(status: JobStatus) -> Iterator[Finding]:
    for member in (*status.servers, *status.workers):
        if member.held_up is not None and not _is_silent(member):
            what = f"{member.id} has waited {member.held_up.lasts_s:.0f} s for {member.held_up}"
            yield Finding(Severity.WARN, what, _where(member), _watch(status), member.id)


def _unreadable(status: JobStatus) -> Iterator[Finding]:
    for member in status.unreadable:
        what = f"the heartbeat of {member} cannot be read and is set aside: another release wrote it"
        yield Finding(Severity.WARN, what, "", "pip show psa_store, on its host and here", member)


def _clocks(status: JobStatus) -> Iterator[Finding]:
    for member in (*status.servers, *status.workers):
        if member.clock_ahead_s is not None and member.clock_ahead_s > CLOCK_SKEW_S:
            what = f"its clock is {member.clock_ahead_s:.0f} s ahead of ours: ages shown here are wrong for it"
            look = f"on {host_name(member.host)}: chronyc tracking, or timedatectl"
            yield Finding(Severity.WARN, what, _where(member), look, member.id)


# --- what the job does


def _lag(status: JobStatus) -> Iterator[Finding]:
    interval = status.commit_interval
    for server in status.servers:
        if interval and server.lag is not None and server.lag > 2 * interval:
            what = f"server {server.id} has {count(server.lag, 'version')} that are not durable, "
            what += f"more than twice the {interval} between commits: Redis does not keep up, or refuses"
            yield Finding(Severity.SICK, what, _where(server), _doctor(status), server.id)


def _hand_over(status: JobStatus) -> Iterator[Finding]:
    if status.phase in (None, Phase.RUN) or (status.phase_s or 0.0) < HAND_OVER_SLOW_S:
        return
    awaited = [server for server in status.servers if server.awaited]
    for server in awaited:
        what = f"the hand-over ({status.phase}) has waited {status.phase_s:.0f} s for server {server.id}"
        yield _of_member(server, Severity.WARN, what)
    if not awaited:
        what = f"the hand-over is in phase {status.phase} for {status.phase_s:.0f} s"
        yield Finding(Severity.WARN, what, "", _watch(status))


_RULES: Sequence[Callable[[JobStatus], Iterator[Finding]]] = (
    _redis,
    _zookeeper,
    _set_aside,
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
    _held_up,
    _clocks,
    _unreadable,
)
"""What may be the cause before what may be its effect."""


# --- words


def _of_member(member: MemberStatus, severity: Severity, what: str) -> Finding:
    look = f"on {host_name(member.host)}: ps -o pid,stat,etime,args -p {member.pid}"
    return Finding(severity, what, _where(member), look, member.id)


def _is_silent(member: MemberStatus) -> bool:
    return member.heartbeat_age_s is not None and member.heartbeat_age_s > HEARTBEAT_S


def _age(member: MemberStatus) -> str:
    return f"{member.heartbeat_age_s:.0f} s"


def _where(member: MemberStatus) -> str:
    return f"host {host_name(member.host)}, pid {member.pid}"


def _doctor(status: JobStatus) -> str:
    return f"psa doctor {status.job}"


def _watch(status: JobStatus) -> str:
    return f"psa status {status.job} --watch"


def _serve(status: JobStatus) -> str:
    return f"psa server --job {status.job}"


def _held(worker: WorkerStatus | GoneMember) -> str:
    return cells(worker.cells) or numbered("rank", worker.ranks)


def _waiting_for(worker: WorkerStatus, status: JobStatus) -> list[WorkerStatus]:
    """Those that need something of its cells to go on."""
    return [each for each in status.workers if not set(worker.cells).isdisjoint(each.waits_for)]


def _step_s(worker: WorkerStatus) -> float:
    """How long a step takes, in the mean; with stages what it waits belongs to it. 0 if that is not known."""
    return (worker.compute_s or 0.0) + (worker.wait_s or 0.0)
