"""Kills and stops processes: members of the job, `psa run`, Redis, ZooKeeper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from chaos.cluster.zookeeper import NoLeader
from chaos.inject.context import FIRE_WITHIN_S, Context, NotFired, choose, controller, kill, living, stopped
from chaos.job import session_of
from chaos.schedule import ScheduledFault
from chaos.site import ZOOKEEPER_NODES
from chaos.tail import Process, alive


@contextmanager
def kill_members(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Kill one worker or server, the controller, or all workers or servers."""
    yield kill(_targets(context, fault))


def stop_members(context: Context, fault: ScheduledFault) -> AbstractContextManager[str]:
    """Stop one worker or server, the controller, or all workers or servers."""
    return stopped(_targets(context, fault))


def stop_run(context: Context, _fault: ScheduledFault) -> AbstractContextManager[str]:
    """Stop `psa run` and all its children."""
    return stopped(session_of(_run_pid(context)))


@contextmanager
def kill_replacement(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Kill a worker or server, and the process that is started in its place as soon as that has begun its journal."""
    role = fault.kind.rpartition("-")[2]
    before = living(context, role)
    killed = kill([choose(before, fault, role).pid])

    def started() -> Process | None:
        context.tail.look()
        return next((each for each in context.tail.living(role) if each not in before), None)

    heir = context.until(started, FIRE_WITHIN_S, f"no {role} was started in place of the killed one")
    yield f"{killed}; in its place {kill([heir.pid])}"


def stop_everything(context: Context, _fault: ScheduledFault) -> AbstractContextManager[str]:
    """Stop the job, Redis and ZooKeeper: clocks go on meanwhile, as they do while a machine is suspended."""
    nodes = [context.site.zookeeper.pid(node) for node in range(ZOOKEEPER_NODES)]
    return stopped([*session_of(_run_pid(context)), context.site.redis.pid, *nodes])


@contextmanager
def kill_run(context: Context, _fault: ScheduledFault) -> Iterator[str]:
    """Kill `psa run` alone: its children must notice and end; then the same command again."""
    main = _run_pid(context)
    children = context.job.kill_main()
    context.until(
        lambda: True if not any(alive(child) for child in children) else None,
        FIRE_WITHIN_S,
        f"children of a killed `psa run` live on: {children}",
    )
    yield f"SIGKILL to `psa run`, pid {main}"
    context.job.start()


@contextmanager
def kill_everything(context: Context, _fault: ScheduledFault) -> Iterator[str]:
    """Kill the job, Redis and ZooKeeper at once; then start all of them again."""
    context.job.kill()
    context.site.redis.kill()
    for node in range(ZOOKEEPER_NODES):
        context.site.zookeeper.kill(node)
    yield "SIGKILL to the job, Redis and ZooKeeper"
    context.site.redis.start()
    context.site.zookeeper.start()
    context.job.start()


def zookeeper_nodes(context: Context, fault: ScheduledFault) -> list[int]:
    """Return the nodes that a fault of ZooKeeper is for: the leader, a follower, or both."""

    def leader() -> int | None:
        try:
            return context.site.zookeeper.leader()
        except NoLeader:
            return None

    leading = context.until(leader, FIRE_WITHIN_S, "ZooKeeper had no leader")
    followers = [node for node in range(ZOOKEEPER_NODES) if node != leading]
    match fault.kind.rpartition("-")[2]:
        case "leader":
            return [leading]
        case "follower":
            return [choose(followers, fault, "follower")]
        case _:
            return [leading, choose(followers, fault, "follower")]


@contextmanager
def kill_zookeeper(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Kill nodes, and start them again."""
    nodes = zookeeper_nodes(context, fault)
    pids = [context.site.zookeeper.pid(node) for node in nodes]
    for node in nodes:
        context.site.zookeeper.kill(node)
    yield f"SIGKILL to ZooKeeper nodes {nodes}, pids {pids}"
    context.site.zookeeper.start()


@contextmanager
def stop_zookeeper(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Stop a node."""
    (node,) = zookeeper_nodes(context, fault)
    with stopped([context.site.zookeeper.pid(node)]) as evidence:
        yield f"{evidence}, ZooKeeper node {node}"


@contextmanager
def kill_redis(context: Context, _fault: ScheduledFault) -> Iterator[str]:
    """Kill Redis, and start it again."""
    pid = context.site.redis.pid
    context.site.redis.kill()
    yield f"SIGKILL to Redis, pid {pid}"
    context.site.redis.start()


def stop_redis(context: Context, _fault: ScheduledFault) -> AbstractContextManager[str]:
    """Stop Redis."""
    return stopped([context.site.redis.pid])


def _run_pid(context: Context) -> int:
    main = context.job.main_pid()
    if main is None:
        raise NotFired("there was no `psa run`")
    return main


def _targets(context: Context, fault: ScheduledFault) -> list[int]:
    match fault.kind.partition("-")[2]:
        case "controller":
            return [controller(context).pid]
        case "all-workers":
            return [each.pid for each in living(context, "worker")]
        case "all-servers":
            return [each.pid for each in living(context, "server")]
        case role:
            return [choose(living(context, role), fault, role).pid]
