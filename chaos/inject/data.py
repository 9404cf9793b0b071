"""Faults of what is stored and of what it is stored on: lost, damaged, no memory, no disk; and of the clock."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import redis

from chaos.cluster.zookeeper import NoLeader
from chaos.inject.context import FIRE_WITHIN_S, Context, NotFired, alternating, choose, kill, living
from chaos.job import signal_if_alive
from chaos.schedule import ScheduledFault
from psa_store.cluster import newest_common
from psa_store.job.layout import layout_from_json
from psa_store.storage import RedisStore

_SLOW_DISK_PERIOD_S = 0.1
_JUMP_S = 3600
_TRIES = 5


def _client(context: Context) -> redis.Redis:
    return redis.Redis.from_url(context.site.redis.url, socket_timeout=5.0)


@contextmanager
def wipe_redis(context: Context, _fault: ScheduledFault) -> Iterator[str]:
    """Delete all keys."""
    with _client(context) as client:
        before = client.dbsize()
        client.flushall()
    yield f"{before} keys are gone"


@contextmanager
def wipe_zookeeper(context: Context, _fault: ScheduledFault) -> Iterator[str]:
    """Kill all nodes, delete their data, and start them again."""

    def count() -> int | None:
        try:
            return context.site.zookeeper.znodes()
        except NoLeader:
            return None  # a busy machine, or an election

    before = context.until(count, FIRE_WITHIN_S, "no ZooKeeper node reported its number of znodes")
    context.site.zookeeper.wipe()
    yield f"{before} znodes are gone"
    context.site.zookeeper.start()


@contextmanager
def flush_functions(context: Context, _fault: ScheduledFault) -> Iterator[str]:
    """Delete the functions of Redis."""
    with _client(context) as client:
        known = len(client.function_list())
        client.function_flush()
        if not known:
            raise NotFired("Redis had no functions")
    yield f"{known} library flushed"


@contextmanager
def damage_value(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Flip a bit of the version that a take-over would begin with, and kill all servers; a server must find it."""
    job = context.spec.name
    with _client(context) as client, closing(RedisStore(context.site.redis.url, timeout_s=5.0)) as store:
        found = store.read_job(job)
        if found is None:
            raise NotFired("the job is not stored")
        versioned = [shard.index for shard in layout_from_json(found[1]).versioned]

        def newest() -> int | None:
            heads = store.heads(job, versioned)
            return newest_common({head.shard: [each.version for each in head.manifests] for head in heads})

        for _ in range(_TRIES):
            version = newest()
            (head,) = store.heads(job, [choose(versioned, fault, "shard")])
            manifest = head.manifest(-1 if version is None else version)
            if manifest is None:
                continue
            keys = manifest.chunk_keys(job, head.shard)
            key = keys[fault.number % len(keys)]
            at = fault.number // len(keys) % client.strlen(key)
            (byte,) = client.getrange(key, at, at)
            client.setrange(key, at, bytes([byte ^ 0x10]))
            killed = kill([each.pid for each in living(context, "server")])
            if newest() == version:
                break  # else a commit was faster, and the damaged version will not be read
        else:
            raise NotFired("there was a newer version each time that one was damaged")

    def noticed() -> bool | None:
        context.tail.look()
        return True if context.tail.marked_corrupt else None

    context.until(noticed, FIRE_WITHIN_S, f"no server noticed that {key} is damaged")
    yield f"bit flipped in {key} at {at}; {killed}; a server marked version {version} corrupt"


@contextmanager
def limit_redis_memory(context: Context, _fault: ScheduledFault) -> Iterator[str]:
    """Make Redis refuse writes for lack of memory."""
    with _client(context) as client:
        client.config_set("maxmemory", "1mb")
        try:
            try:
                client.set("chaos:full", b"x" * 1024)
            except redis.exceptions.OutOfMemoryError as error:
                yield str(error)
            else:
                raise NotFired("Redis took a value beyond its memory limit")
        finally:
            client.config_set("maxmemory", "0")
            client.delete("chaos:full")


@contextmanager
def fill_redis_disk(context: Context, _fault: ScheduledFault) -> Iterator[str]:
    """Fill the disk on which Redis writes."""
    context.site.redis.fill_disk()
    try:

        def refused() -> str | None:
            with _client(context) as client:
                try:
                    client.set("chaos:full", b"x" * 1024)
                except redis.exceptions.RedisError as error:
                    return str(error) if "MISCONF" in str(error) or "No space" in str(error) else None
            return None

        yield context.until(refused, FIRE_WITHIN_S, "Redis went on writing to a full disk")
    finally:
        context.site.redis.free_disk()


@contextmanager
def slow_redis_disk(context: Context, _fault: ScheduledFault) -> Iterator[str]:
    """Stop Redis for a half of each period, as a slow disk does."""
    pid = context.site.redis.pid
    with alternating(
        lambda: signal_if_alive(pid, signal.SIGSTOP),
        lambda: signal_if_alive(pid, signal.SIGCONT),
        _SLOW_DISK_PERIOD_S / 2,
        _SLOW_DISK_PERIOD_S / 2,
    ):
        yield f"SIGSTOP and SIGCONT to Redis, pid {pid}, in turns"


@contextmanager
def jump_clock(_context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Move the wall clock by an hour, and back."""
    jump_s = _JUMP_S if fault.number else -_JUMP_S
    _shift_clock(jump_s)
    try:
        yield f"CLOCK_REALTIME moved by {jump_s} s"
    finally:
        _shift_clock(-jump_s)


def _shift_clock(by_s: float) -> None:
    try:
        time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + by_s)
    except PermissionError as error:
        raise NotFired("the clock of this machine may not be set") from error
