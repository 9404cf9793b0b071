"""Connections to Redis: explicit timeouts, no hidden retries, foreign errors translated in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
from redis._parsers import Encoder
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry
from redis.utils import str_if_bytes

from psa_store.errors import DependencyUnfit, DependencyUnreachable, UsageError

_PACK_COPY_BYTES_MAX = 6000
_UNFIT = {
    "OOM": "it is at its maxmemory limit: give it more memory, or drop jobs that are no longer needed",
    "MISCONF": "it cannot write to its disk: make room, or look into its log",
    "READONLY": "it is a replica: point PSA_REDIS at the master",
    "NOPERM": "the user may not do this: allow it in the ACL",
    "NOAUTH": "it wants a password: put it into the URL of PSA_REDIS",
    "WRONGPASS": "the password is wrong: correct the URL of PSA_REDIS",
}


def printable(url: str) -> str:
    """The URL without its password, for messages."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url


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
    except ValueError as error:
        raise UsageError(f"PSA_REDIS={printable(url)!r} is no URL of a Redis: {error}") from error


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn redis-py's exceptions into ours, naming the address."""
    try:
        yield
    except redis.exceptions.AuthenticationError as error:
        raise DependencyUnfit(f"Redis at {printable(url)} refuses us: {error}") from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise DependencyUnreachable(
            f"Redis at {printable(url)} does not answer: {error}. Is it running, and is PSA_REDIS right?"
        ) from error
    except redis.exceptions.ResponseError as error:
        word = str(error).split(" ", 1)[0]
        if word in _UNFIT or "OOM" in str(error):
            why = _UNFIT.get(word, _UNFIT["OOM"])
            raise DependencyUnfit(f"Redis at {printable(url)} refuses to write ({error}): {why}") from error
        raise


def text(reply: Any) -> str:
    """A reply that must be text."""
    return str(str_if_bytes(reply))
