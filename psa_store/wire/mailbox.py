"""A thread-safe queue whose arrival shows on a file descriptor, so that an event loop can wait for it and sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Any thread may :meth:`post`; one reader takes everything with :meth:`drain`. Close it when the reader is gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: list[T] = []
        self._nudged = False
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        return self._receiver.fileno()

    def post(self, message: T) -> None:
        with self._lock:
            self._messages.append(message)
            if len(self._messages) == 1:
                self._wake()

    def nudge(self) -> None:
        """Wake the reader without a message. Takes no lock, so a signal handler may call it."""
        self._wake()
        self._nudged = True  # not before: a byte without it only comes again

    def drain(self) -> Sequence[T]:
        """Take everything that is there."""
        if not self._messages and not self._nudged:
            return ()  # a byte to wake the reader is never there without one of them
        with self._lock:
            self._nudged = False
            with contextlib.suppress(BlockingIOError):
                self._receiver.recv(4096)
            messages, self._messages = self._messages, []
        return messages

    def _wake(self) -> None:
        # Full or closed: the reader has a wake-up pending, or wants none any more.
        with contextlib.suppress(OSError):
            self._sender.send(b"\0")

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()
