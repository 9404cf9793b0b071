"""What a Redis is like: the facts that it reports, and how fast it moves values. For `psa doctor`.

Nothing is changed but a few keys of our own, which expire by themselves if we die before they are removed. Our
functions are not loaded: a job that runs may use those of another version of this package.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis

from psa_store.errors import DependencyUnreachable
from psa_store.storage import keys
from psa_store.storage.caller import Caller, has_functions, lacks
from psa_store.storage.chunk_reader import read_into
from psa_store.storage.connection import text, translated
from psa_store.storage.head import CHUNK_BYTES
from psa_store.storage.stream import Command, Stream

PROBE_BYTES = 8 * CHUNK_BYTES
_PROBE_S = 2.0
"""How long each direction may take: over a slow link fewer bytes are moved."""
_READ_AT_ONCE = 4
"""Chunks between two looks at the clock."""
_PROBE_EXPIRY_S = 60
_CLOCK_LOOKS = 5
_CONNECTIONS_MAX = 2


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """What a Redis says of itself. What it does not report (managed ones hide their configuration) is None."""

    where: str
    product: str
    """Its name and version, for people."""
    version: str
    """Of Redis, or of the Redis that it is compatible with."""
    has_functions: bool
    """And lets us use them; so for the next."""
    has_scripts: bool
    is_replica: bool
    eviction: str | None
    memory_limit_bytes: int
    """0: none."""
    system_memory_bytes: int
    """0: unknown."""
    used_memory_bytes: int
    appends: bool
    """Whether it logs every write on disk."""
    appendfsync: str | None
    save: str | None
    """When it takes snapshots: pairs of seconds and changes; empty for never."""
    compresses: bool | None
    """Whether it compresses snapshots, with which a rewritten log begins, too."""
    cannot_persist: bool
    """Whether its last write to disk failed."""
    round_trip_s: float
    clock_ahead_s: float
    """Its clock against ours."""
    run_id: str
    """Another one after each of its restarts."""
    in_cluster: bool = False
    replicas: int = 0
    """That follow it now."""

    @property
    def room_bytes(self) -> int | None:
        """What is left up to its limit, or the memory of its machine; None if neither is known."""
        limits = [limit for limit in (self.memory_limit_bytes, self.system_memory_bytes) if limit > 0]
        return min(limits) - self.used_memory_bytes if limits else None


@dataclass(frozen=True, slots=True)
class RedisRates:
    """How fast values of the size of a chunk were written and read over one connection."""

    write_bytes_per_s: float
    read_bytes_per_s: float


def examine_redis(url: str, timeout_s: float) -> RedisFacts:
    """Ask a Redis about itself.

    Raises:
        DependencyUnreachable: it does not answer within ``timeout_s``, or does not let us ask.
        UsageError: ``url`` is not one of a Redis.
    """
    with closing(Caller(url, timeout_s, _CONNECTIONS_MAX)) as caller:
        return facts_of(caller)


def facts_of(caller: Caller) -> RedisFacts:
    """The same through connections that are there; raises DependencyUnreachable like it."""
    return caller.retrying(lambda: _ask(caller))


def _ask(caller: Caller) -> RedisFacts:
    info: Any = caller.client.info()
    round_trip_s, clock_ahead_s = min(_look_at_clock(caller.client) for _ in range(_CLOCK_LOOKS))
    appendfsync, save, compression = (
        _configured(caller.client, name) for name in ("appendfsync", "save", "rdbcompression")
    )
    valkey = info.get("valkey_version")
    return RedisFacts(
        where=caller.where,
        product=f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version', '')}",
        version=str(info.get("redis_version", "")),
        has_functions=has_functions(caller.client),
        has_scripts=_may_run_scripts(caller.client),
        is_replica=info.get("role") == "slave",
        eviction=info.get("maxmemory_policy"),
        memory_limit_bytes=int(info.get("maxmemory", 0)),
        system_memory_bytes=int(info.get("total_system_memory", 0)),
        used_memory_bytes=int(info.get("used_memory", 0)),
        appends=bool(info.get("aof_enabled", 0)),
        appendfsync=appendfsync,
        save=save,
        compresses=None if compression is None else compression == "yes",
        cannot_persist=_cannot_persist(info, save),
        round_trip_s=round_trip_s,
        clock_ahead_s=clock_ahead_s,
        run_id=str(info.get("run_id", "")),
        in_cluster=bool(info.get("cluster_enabled", 0)),
        replicas=int(info.get("connected_slaves", 0)),
    )


def measure_redis(url: str, timeout_s: float) -> RedisRates:
    """Write chunks under names of our own as a commit does, read them as a load does, and remove them.

    Raises:
        DependencyUnreachable: it does not answer, or refuses; the keys that are left expire in a minute.
    """
    token = secrets.token_hex(8)
    chunk = memoryview(os.urandom(CHUNK_BYTES))
    written: list[str] = []
    with closing(Caller(url, timeout_s, _CONNECTIONS_MAX)) as caller:
        try:
            with translated(url):
                with Stream(caller.pool, _writes(token, chunk, written)) as stream:
                    write_s = _timed(stream.next_answer)
                read_bytes_per_s = _read_back(caller, written)
        finally:
            with suppress(DependencyUnreachable), translated(url):
                if written:
                    caller.client.unlink(*written)
    return RedisRates(len(written) * CHUNK_BYTES / write_s, read_bytes_per_s)


def _writes(token: str, chunk: memoryview, written: list[str]) -> Iterator[Command]:
    """SETs until enough is written, or time is up; ``written`` gets their keys."""
    end_s = time.monotonic() + _PROBE_S
    while len(written) * CHUNK_BYTES < PROBE_BYTES and (not written or time.monotonic() < end_s):
        key = keys.probe(token, len(written))
        written.append(key)
        yield Command(("SET", key, chunk, "EX", _PROBE_EXPIRY_S))


def _read_back(caller: Caller, written: Sequence[str]) -> float:
    """GETs of what was written, until time is up; bytes per second."""
    place = memoryview(bytearray(CHUNK_BYTES))
    done, took_s = 0, 0.0
    while done < len(written) and took_s < _PROBE_S:
        some = [(key, place) for key in written[done : done + _READ_AT_ONCE]]
        took_s += _timed(partial(read_into, caller.pool, some))
        done += len(some)
    return done * CHUNK_BYTES / took_s


def _timed(action: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


def _look_at_clock(client: redis.Redis) -> tuple[float, float]:
    """Round trip, and how far its clock is ahead of ours in the middle of that."""
    before_s, started_s = time.time(), time.monotonic()
    reply: Any = client.time()
    round_trip_s = time.monotonic() - started_s
    return round_trip_s, reply[0] + reply[1] / 1e6 - (before_s + round_trip_s / 2)


def _may_run_scripts(client: Any) -> bool:
    """Whether our functions may be called as a script. Asked for one that it does not know."""
    try:
        client.evalsha("0" * 40, 0)
    except redis.exceptions.NoScriptError:
        return True
    except redis.exceptions.ResponseError as error:
        if not lacks(error):
            raise
    return False


def _configured(client: redis.Redis, name: str) -> str | None:
    """One setting; None where reading the configuration is not allowed or not known."""
    try:
        found: Any = client.config_get(name)
    except redis.exceptions.ResponseError:
        return None
    return text(found[name]) if name in found else None


def _cannot_persist(info: dict[str, Any], save: str | None) -> bool:
    appending = bool(info.get("aof_enabled", 0)) and info.get("aof_last_write_status", "ok") != "ok"
    return appending or (save != "" and info.get("rdb_last_bgsave_status", "ok") != "ok")
