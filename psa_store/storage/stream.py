"""Commands in a stream, a few under way at once: large values go out while earlier ones are being stored.

A connection whose replies were not read to their end is thrown away, whatever ended the exchange: its next reply
would belong to another command.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import redis

# redis-py's connections are not typed. Only their own send and receive are used here, so TLS works as anywhere.
_UNANSWERED_MAX = 4
"""Commands under way at once: enough to keep Redis busy while the next value is prepared."""


@dataclass(frozen=True, slots=True)
class Command:
    """One idempotent command. The memory of its values must not change until it is answered."""

    words: tuple[Any, ...]
    awaited: int | None = None
    """By what the sender knows the answer; None if it is enough that Redis does not refuse."""


class Stream:
    """Idempotent commands on their way over one connection.

    Args:
        pool: where the connection comes from, and every new one after it broke.
        commands: taken one by one as there is room for them, each only once; what an answer taught may shape those
            that are not taken yet. It must not raise: the stream would seem to be complete.
    """

    def __init__(self, pool: redis.ConnectionPool, commands: Iterator[Command]) -> None:
        self._pool = pool
        self._commands = commands
        self._unanswered: deque[Command] = deque()
        self._connection: Any = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._let_go(broken=kind is not None or bool(self._unanswered))

    def next_answer(self) -> tuple[int, Any] | None:
        """Go on until an awaited command is answered; returns by what it is known, and its reply. None after the last.

        May be called again after it failed: what was not answered is sent once more, over another connection.

        Raises:
            redis.exceptions.RedisError: the exchange broke, or Redis refuses the command.
        """
        try:
            if self._connection is None:
                self._connection = self._pool.get_connection()
                for command in self._unanswered:
                    self._connection.send_command(*command.words)
            while self._send():
                reply = self._connection.read_response()
                awaited = self._unanswered.popleft().awaited
                if awaited is not None:
                    return awaited, reply
        except BaseException:
            self._let_go(broken=True)
            raise
        return None

    def _send(self) -> bool:
        """Send what there is room for; whether anything is under way."""
        while len(self._unanswered) < _UNANSWERED_MAX:
            command = next(self._commands, None)
            if command is None:
                break
            self._unanswered.append(command)
            self._connection.send_command(*command.words)
        return bool(self._unanswered)

    def _let_go(self, *, broken: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            if broken:
                connection.disconnect()
            self._pool.release(connection)
