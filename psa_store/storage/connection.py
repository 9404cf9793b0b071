"""Connections to Redis: explicit timeouts, no hidden retries, foreign errors translated in one place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis._parsers import Encoder
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, PythonRespSerializer
from redis.retry import Retry
from redis.utils import str_if_bytes

from psa_store.config import Settings
from psa_store.config.private_servers import redis_of
from psa_store.errors import DependencyUnfit, DependencyUnreachable, UsageError
from psa_store.logs import printable
from psa_store.storage.addresses import HostPort, Kind, read_address
from psa_store.storage.refusals import is_of_acl, named
from psa_store.storage.sentinels import Sentinels

_PACK_COPY_BYTES_MAX = 6000
_ACL = "its ACL does not allow this: allow it, or use another user"


class OlderHead(redis.exceptions.ResponseError):
    """A head was read that is older than before."""


class TooFewReplicas(redis.exceptions.ResponseError):
    """WAIT was answered with fewer replicas than are to acknowledge."""


_UNFIT: tuple[tuple[type[Exception], str], ...] = (
    (redis.exceptions.OutOfMemoryError, "it is at its maxmemory limit: raise it, or delete jobs that are done"),
    (redis.exceptions.ReadOnlyError, "it is a replica: see that there is a master, and that PSA_REDIS leads to it"),
    (redis.exceptions.MasterDownError, "it is a replica without its master: see that there is one"),
    (OlderHead, "it went back in time: servers of the job bring it up to date; to take it as it is, open it anew"),
    (TooFewReplicas, "nothing counts as durable until they do: see that its replicas run and follow it"),
    (redis.exceptions.ClusterDownError, "its cluster has no master for some slots: see `redis-cli cluster info`"),
    (redis.exceptions.NoPermissionError, _ACL),
    (redis.exceptions.AuthenticationError, "it wants a user and password: put them into the URL of PSA_REDIS"),
)
_UNREACHABLE_NOW = (
    TooFewReplicas,
    OlderHead,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,  # MASTERDOWN is one
    redis.exceptions.TryAgainError,
    redis.exceptions.BusyLoadingError,
)
_UNREACHABLE_NOW_CODES = ("NOREPLICAS", "UNBLOCKED")
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


class Route:
    """Where the connections of a pool go. Thread-safe.

    Connections that were made before :meth:`leave` are not used again, but made anew.
    """

    def __init__(self, sentinels: Sentinels | None) -> None:
        self.sentinels = sentinels
        self.generation = 0
        self._address: HostPort | None = None

    def leave(self) -> None:
        """Give up every connection: what it goes to is not the master, or not now."""
        self.generation += 1  # of two threads one may count for both, which is enough

    def doubt(self) -> None:
        """What the Sentinels named last could not be used."""
        if self.sentinels is not None:
            self.sentinels.doubt()

    def master(self) -> HostPort | None:
        """Ask the Sentinels, if there are some; None: the address of the pool is right.

        Raises:
            redis.exceptions.ConnectionError: they name none.
        """
        if self.sentinels is None:
            return None
        address = self.sentinels.master()
        if address != self._address:
            self._address = address
            self.leave()  # the others go to the one before, which may answer still
        return address


class _Routed(AbstractConnection):
    """What all our connections have in common.

    A server that was demoted keeps its connections: behind a proxy, a DNS name or a VIP they would stay there for ever.
    So whatever says *not here, not now* makes all of the pool's connections be made anew, each when it is used next.
    """

    def __init__(self, *, route: Route, **options: Any) -> None:
        self._route = route
        self._generation = route.generation
        super().__init__(**options)

    def connect(self) -> None:
        if self._generation != self._route.generation:
            self.disconnect()  # type: ignore[no-untyped-call]
        super().connect()  # type: ignore[no-untyped-call]

    def _connect(self) -> Any:
        address = self._route.master()
        if address is not None:
            self.host, self.port = address
        self._generation = self._route.generation
        try:
            return super()._connect()  # type: ignore[no-untyped-call, safe-super]
        except OSError:
            self._route.doubt()
            raise

    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health)
        if self._route.sentinels is not None:
            # What was the master a moment ago may be back, as a replica or about to become one.
            self.send_command("INFO", "replication")  # type: ignore[no-untyped-call]
            if b"role:master" not in self.read_response():
                self._route.doubt()
                raise redis.exceptions.ConnectionError(f"{self.host}:{self.port} is a replica, though not for Sentinel")

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)
        except redis.exceptions.RedisError as error:
            if unreachable_now(error):
                self._route.leave()
            raise


class _Tcp(_Routed, redis.Connection):
    pass


class _Tls(_Routed, redis.SSLConnection):
    pass


class _Unix(_Routed, redis.UnixDomainSocketConnection):
    pass


_CLASSES = {redis.SSLConnection: _Tls, redis.UnixDomainSocketConnection: _Unix}


def make_pool(url: str, timeout_s: float, connections_max: int) -> redis.BlockingConnectionPool:
    """A pool whose connections fail instead of retrying; raises UsageError if the URL cannot be used."""
    address = read_address(url)
    sentinels = None
    if address.kind is Kind.SENTINEL:
        sentinels = Sentinels(address.hosts, address.name, address.sentinel_options, timeout_s / len(address.hosts))
    # hiredis' packer copies large values three times; its parser is kept.
    encoder = Encoder("utf-8", "strict", False)  # type: ignore[no-untyped-call]
    ours = {
        "connection_class": _CLASSES.get(address.options.get("connection_class", redis.Connection), _Tcp),
        "route": Route(sentinels),
        "max_connections": connections_max,
        "timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "health_check_interval": 0,
        "protocol": 2,
        "command_packer": PythonRespSerializer(_PACK_COPY_BYTES_MAX, encoder.encode),
    }
    return redis.BlockingConnectionPool(**{**address.options, **ours})  # type: ignore[no-untyped-call]


def unreachable_now(error: Exception) -> bool:
    """Whether it means that the master is elsewhere, or nowhere for a while: ask again which it is, and try again.

    All users of Redis judge by this alone.
    """
    return isinstance(error, _UNREACHABLE_NOW) or _reason(error).startswith(_UNREACHABLE_NOW_CODES)


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
        if is_of_acl(_reason(error)):
            raise DependencyUnfit(f"Redis at {printable(url)} refuses ({named(_reason(error))}): {_ACL}") from error
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
