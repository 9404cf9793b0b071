"""Injects faults. An injector is a context: entering it injects the fault, leaving it undoes the fault.

What an injector yields is the evidence that the fault happened, taken from outside the job; without evidence it raises
:class:`NotFired`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from chaos.inject import data, failpoints, links, neighbours, processes
from chaos.inject.context import Context, Injector, NotFired
from chaos.schedule import ScheduledFault

__all__ = ["Context", "NotFired", "inject", "prepare"]

_INJECTORS: dict[str, Injector] = {
    "kill-run": processes.kill_run,
    "kill-redis": processes.kill_redis,
    "kill-redis-briefly": processes.kill_redis,
    "kill-zk-follower": processes.kill_zookeeper,
    "kill-zk-leader": processes.kill_zookeeper,
    "kill-zk-quorum": processes.kill_zookeeper,
    "kill-everything": processes.kill_everything,
    "kill-starting-worker": processes.kill_replacement,
    "kill-starting-server": processes.kill_replacement,
    "stop-run": processes.stop_run,
    "stop-everything": processes.stop_everything,
    "stop-redis": processes.stop_redis,
    "stop-zk-follower": processes.stop_zookeeper,
    "stop-zk-leader": processes.stop_zookeeper,
    "wipe-redis": data.wipe_redis,
    "wipe-zookeeper": data.wipe_zookeeper,
    "damage-value": data.damage_value,
    "flush-functions": data.flush_functions,
    "redis-memory-limit": data.limit_redis_memory,
    "redis-disk-full": data.fill_redis_disk,
    "redis-disk-slow": data.slow_redis_disk,
    "redis-torn-reply": links.tear,
    "redis-torn-request": links.tear,
    "zk-torn-reply": links.tear,
    "clock-jump": data.jump_clock,
    "neighbour-znodes": neighbours.write_over_znodes,
    "neighbour-documents": neighbours.write_over_documents,
    "neighbour-connections": neighbours.say_nothing,
    "neighbour-key": neighbours.want_in,
}
_BY_PREFIX: dict[str, Injector] = {
    "kill": processes.kill_members,
    "stop": processes.stop_members,
    "die": failpoints.hit_failpoint,
    "hang": failpoints.hit_failpoint,
    "redis": links.disturb_proxies,
    "zk": links.disturb_proxies,
    "cut": links.cut,
    "mute": links.cut,
    "isolate": links.isolate,
    "throttle": links.throttle,
    "flap": links.flap,
}
"""By the first word of a kind, for kinds without an injector of their own."""


@contextmanager
def inject(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Inject a fault; yield the evidence; undo on leaving what must be undone."""
    injector = _INJECTORS.get(fault.kind) or _BY_PREFIX[fault.kind.partition("-")[0]]
    with injector(context, fault) as evidence:
        yield evidence


def prepare(context: Context, fault: ScheduledFault) -> None:
    """Arm a fault that must be armed before the job starts."""
    failpoints.arm_for(context, fault)
