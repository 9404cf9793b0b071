"""What PSA_REDIS may say: one Redis, or Sentinels that know the master. Pure.

    redis://user:password@host:port/0                   rediss://… (TLS), unix:///path
    redis+sentinel://user:password@h1,h2:26380/NAME/0   rediss+sentinel://…

User and password are those of Redis. Sentinels have their own: ``?sentinel_username=…&sentinel_password=…``. TLS is for
both. Everything else after the ``?`` goes to redis-py, as in ``ssl_ca_certs=/path``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

from redis.connection import parse_url

from psa_store.config.listening import split_host_port
from psa_store.errors import UsageError
from psa_store.logs import printable

HostPort = tuple[str, int]
_REDIS_PORT = 6379
_SENTINEL_PORT = 26379
_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}
_OF_TLS = "ssl_"


class Kind(StrEnum):
    """What knows where the master is."""

    SERVER = "server"
    SENTINEL = "sentinel"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """An address, read."""

    kind: Kind
    options: Mapping[str, Any]
    """What redis-py takes for a connection to Redis."""
    hosts: tuple[HostPort, ...] = ()
    """The Sentinels."""
    name: str = ""
    """By which the Sentinels know the master."""
    sentinel_options: Mapping[str, Any] = field(default_factory=dict)
    """What redis-py takes for a connection to a Sentinel, without host and port."""

    @property
    def addresses(self) -> tuple[HostPort, ...]:
        """Each host that is connected to first, with its port; none where that is a Unix socket."""
        if self.hosts or "path" in self.options:
            return self.hosts
        return ((self.options.get("host", "localhost"), self.options.get("port", _REDIS_PORT)),)


def read_address(url: str) -> RedisAddress:
    """Read the value of PSA_REDIS; raises UsageError, which shows no password, if it cannot be used."""
    scheme, _, rest = url.partition("://")
    base, _, kind = scheme.partition("+")
    try:
        if not kind:
            return RedisAddress(Kind.SERVER, parse_url(url))  # type: ignore[no-untyped-call]
        return _read_sentinels(base, Kind(kind), rest)
    except (ValueError, UsageError):
        # Its text quotes what stands where the port should be, which may be half of the password: no cause, no quote.
        raise UsageError(
            f"PSA_REDIS={printable(url)!r} is no URL of a Redis: use redis://user:password@host:port/0, rediss://…, "
            "unix:///path or redis+sentinel://user:password@host,host/NAME/0, and "
            "percent-encode '/', '#', '?' and '@' in the password."
        ) from None


def _read_sentinels(base: str, kind: Kind, rest: str) -> RedisAddress:
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    user, at, hosts = authority.rpartition("@")
    name, _, database = path.partition("/")
    if not name:
        raise ValueError("no name of a master")
    options = parse_qsl(query, strict_parsing=bool(query))
    for_redis = urlencode([each for each in options if each[0] not in _SENTINEL_OPTIONS])
    one = parse_url(f"{base}://{user}{at}host/{int(database or 0)}?{for_redis}")  # type: ignore[no-untyped-call]
    del one["host"]
    tls = {key: value for key, value in one.items() if key == "connection_class" or key.startswith(_OF_TLS)}
    return RedisAddress(
        kind=kind,
        options=one,
        hosts=tuple(map(_sentinel, hosts.split(","))),
        name=unquote(name),
        sentinel_options=tls | {_SENTINEL_OPTIONS[key]: value for key, value in options if key in _SENTINEL_OPTIONS},
    )


def _sentinel(text: str) -> HostPort:
    host, port = split_host_port(text)
    return host, port or _SENTINEL_PORT
