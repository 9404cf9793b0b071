"""Connections to Redis: explicit timeouts, no hidden retries, foreign errors translated in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis._parsers import Encoder
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry
from redis.utils import str_if_bytes

from psa_store.config import Settings
from psa_store.config.private_servers import redis_of
from psa_store.errors import DependencyUnfit, DependencyUnreachable, UsageError
from psa_store.logs import printable

_PACK_COPY_BYTES_MAX = 6000
_UNFIT: tuple[tuple[type[Exception], str], ...] = (
    (redis.exceptions.OutOfMemoryError, "it is at its maxmemory limit: raise it, or delete jobs that are done"),
    (redis.exceptions.ReadOnlyError, "it is a replica: point PSA_REDIS at the master"),
    (redis.exceptions.NoPermissionError, "its ACL does not allow this: allow it, or use another user"),
    (redis.exceptions.AuthenticationError, "it wants a user and password: put them into the URL of PSA_REDIS"),
)
_CANNOT_PERSIST = "MISCONF"
_PIPELINE_PREFIX = re.compile(r"^Command # \d+ \(.*?\) of pipeline caused error: ", re.DOTALL)


def known_redis(settings: Settings) -> str:
    """The URL of the settings, else of the private Redis that runs; raises UsageError if neither is known."""
    url = redis_of(settings)
    if url is None:
        raise UsageError(
            f"Redis is not known: set PSA_REDIS to redis://host:port, or start a private one with `psa up` "
            f"(none runs in {settings.home})"
        )
    return url


def make_pool(url: str, timeout_s: float, connections_max: int) -> redis.BlockingConnectionPool:
    """A pool whose connections fail instead of retrying; raises UsageError if the URL cannot be used."""
    # hiredis' packer copies large values three times; its parser is kept.
    encoder = Encoder("utf-8", "strict", False)  # type: ignore[no-untyped-call]
    try:
        return redis.BlockingConnectionPool.from_url(
            url,
            max_connections=connections_max,
            timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=0,
            protocol=2,
            command_packer=PythonRespSerializer(_PACK_COPY_BYTES_MAX, encoder.encode),
        )
    except ValueError:
        # Its text quotes what stands where the port should be, which may be half of the password: no cause, no quote.
        raise UsageError(
            f"PSA_REDIS={printable(url)!r} is no URL of a Redis: use redis://user:password@host:port/0, rediss://… or "
            "unix:///path, and percent-encode '/', '#', '?' and '@' in the password."
        ) from None


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn redis-py's exceptions into ours, naming the address."""
    try:
        yield
    except tuple(kind for kind, _ in _UNFIT) as error:
        remedy = next(remedy for kind, remedy in _UNFIT if isinstance(error, kind))
        raise DependencyUnfit(f"Redis at {printable(url)} refuses ({_reason(error)}): {remedy}") from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise DependencyUnreachable(
            f"Redis at {printable(url)} does not answer: {error}. Is it running, and is PSA_REDIS right?"
        ) from error
    except redis.exceptions.RedisError as error:
        if _reason(error).startswith(_CANNOT_PERSIST):
            raise DependencyUnfit(f"Redis at {printable(url)} cannot write to its disk: make room there") from error
        raise DependencyUnfit(
            f"Redis at {printable(url)} refuses ({_reason(error)}): see its configuration, and what else uses it"
        ) from error


def _reason(error: Exception) -> str:
    """What Redis said, without the command that redis-py puts in front when it ran in a pipeline."""
    return _PIPELINE_PREFIX.sub("", str(error))


def text(reply: Any) -> str:
    """A reply that must be text."""
    return str(str_if_bytes(reply))
