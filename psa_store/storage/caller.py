"""Calls to one Redis: tried again while it is away, its errors translated, our functions loaded when they are missing.

The one policy of retries towards Redis is here; redis-py's own are off (see ``connection.py``). Only what is idempotent
may be called, because an answer may get lost: what each call relies on stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis
import tenacity

from psa_store.errors import DependencyUnfit
from psa_store.logs import printable
from psa_store.storage import library
from psa_store.storage.connection import TooFewReplicas, make_pool, translated, unreachable_now
from psa_store.storage.library import FunctionCall

_PAUSE_S = 0.05
_WAIT_SHARE = 0.5
"""Of the time that an operation may take; less than a connection waits for an answer."""
T = TypeVar("T")


class Caller:
    """The pool of connections to one Redis. Thread-safe."""

    def __init__(self, url: str, timeout_s: float, connections_max: int, replicas_acknowledge: int = 0) -> None:
        self.replicas_acknowledge = replicas_acknowledge
        self.acknowledged = 0
        """By how many replicas the newest durable call was acknowledged."""
        self.where = printable(url)
        self.pool = make_pool(url, timeout_s, connections_max)
        self.client = redis.Redis(connection_pool=self.pool)
        self._url = url
        self._timeout_s = timeout_s
        self._by_script: bool | None = None
        """Whether our functions are called as a script; None: not known yet."""

    def close(self) -> None:
        self.pool.disconnect()

    def leave(self) -> None:
        """Make every connection anew before it is used again, and ask again which Redis is the master."""
        self.pool.connection_kwargs["route"].leave()

    def retrying(self, operation: Callable[[], T]) -> T:
        """Try an idempotent operation again while Redis is away or loading, until ``timeout_s`` is over.

        Raises:
            DependencyUnreachable: it is away still.
            DependencyUnfit: it refuses.
        """
        with translated(self._url):
            return self._retried(operation)

    def with_functions(self, operation: Callable[[], T]) -> T:
        """The same for an operation that calls our functions; loads them first if they were flushed."""
        with translated(self._url):
            try:
                return self._retried(operation)
            except redis.exceptions.NoScriptError:
                pass
            except redis.exceptions.ResponseError as error:
                if "Function not found" not in str(error):
                    raise
            self.load_library()
            return self._retried(operation)

    def prepare(self) -> bool:
        """Find out, once, how our functions are called; returns whether as a script."""
        if self._by_script is None:
            with translated(self._url):
                self._by_script = self._retried(lambda: not has_functions(self.client))
        return self._by_script

    def words(self, call: FunctionCall) -> tuple[Any, ...]:
        """The command that calls one of our functions, in the way that this Redis has. Raises nothing once prepared."""
        return library.words(call, by_script=self.prepare())

    def functions(self, calls: Sequence[FunctionCall], *, durable: bool = True) -> list[Any]:
        """Call functions in one round trip; returns their replies.

        Args:
            durable: wait until as many replicas as are to acknowledge it have what the functions have written, and all
                that was written before them, over whatever connection: a replica takes the writes of its master in
                their order. WAIT speaks for the connection on which it is called, so it follows them on theirs.
        """
        wanted = self.replicas_acknowledge if durable and calls else 0
        commands = [self.words(call) for call in calls]

        def attempt() -> list[Any]:
            pipeline: Any = self.client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            if wanted:
                pipeline.wait(wanted, int(self._timeout_s * 1000 * _WAIT_SHARE))
            replies = list(pipeline.execute())
            if wanted:
                self._judge(replies.pop())
            return replies

        return self.with_functions(attempt)

    def _judge(self, acknowledged: int) -> None:
        """Raise TooFewReplicas; the master may be one that was cut off, and is asked for again."""
        self.acknowledged = acknowledged
        if acknowledged < self.replicas_acknowledge:
            self.leave()
            raise TooFewReplicas(f"{acknowledged} of {self.replicas_acknowledge} replicas have acknowledged it")

    def pipelined(self, commands: Sequence[tuple[str, str]]) -> list[Any]:
        """Reads in one round trip: a command and its key each. Tried once."""
        pipeline: Any = self.client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(pipeline.execute())

    def load_library(self) -> None:
        """Load our functions, unless exactly these are loaded; as a script where there are no functions.

        Raises:
            DependencyUnfit: Redis has neither, or its ACL allows neither.
        """
        with translated(self._url):
            try:
                if self.prepare():
                    self._retried(lambda: self.client.script_load(library.SCRIPT))
                    return
                if not self.loaded_library():
                    self._retried(lambda: self.client.function_load(library.LIBRARY, replace=True))
            except redis.exceptions.ResponseError as error:
                if not lacks(error):
                    raise
                raise DependencyUnfit(
                    f"Redis at {self.where} has neither functions nor scripts for us ({error}): use Redis 7.0 or newer "
                    "or Valkey, and let its ACL allow +fcall, +function|list and +function|load, or +evalsha and "
                    "+script|load"
                ) from error

    def loaded_library(self) -> bool | None:
        """Whether the functions that are loaded are exactly ours; None: none are loaded, or they are a script."""
        if self.prepare():
            return None
        listed = _flatten(self._retried(lambda: self.client.function_list(library=library.NAME, withcode=True)))
        return library.LIBRARY.encode() in listed if listed else None

    def _retried(self, operation: Callable[[], T]) -> T:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self._timeout_s),
            wait=tenacity.wait_fixed(_PAUSE_S),
            retry=tenacity.retry_if_exception(_away),
            reraise=True,
        )
        return retrying(operation)


def _away(error: BaseException) -> bool:
    """Whether it may answer soon."""
    if isinstance(error, redis.exceptions.AuthenticationError):
        return False
    return isinstance(error, redis.exceptions.ConnectionError) or (
        isinstance(error, Exception) and unreachable_now(error)
    )


def has_functions(client: Any) -> bool:
    """Whether Redis has functions, and lets us use them."""
    try:
        client.function_list(library=library.NAME)
    except redis.exceptions.ResponseError as error:
        if not lacks(error):
            raise
        return False
    return True


def lacks(error: redis.exceptions.ResponseError) -> bool:
    """Whether Redis does not know the command, or its ACL refuses it."""
    return isinstance(error, redis.exceptions.NoPermissionError) or "unknown command" in str(error).lower()


def _flatten(reply: Any) -> list[Any]:
    if isinstance(reply, dict):
        return [leaf for pair in reply.items() for item in pair for leaf in _flatten(item)]
    if isinstance(reply, (list, tuple)):
        return [leaf for item in reply for leaf in _flatten(item)]
    return [reply]
