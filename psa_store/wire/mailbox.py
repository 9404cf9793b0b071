"""A thread-safe queue whose arrival shows on a file descriptor, so that an event loop can wait for it and sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Anyone may :meth:`post`; one reader takes everything with :meth:`drain`. Close it when the reader is gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._letters: deque[T] = deque()
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        return self._receiver.fileno()

    def post(self, message: T) -> None:
        with self._lock:
            self._letters.append(message)
            first = len(self._letters) == 1
        if first:
            # Full or closed: the reader has a wake-up pending, or wants none any more.
            with contextlib.suppress(OSError):
                self._sender.send(b"\0")

    def nudge(self) -> None:
        """Wake the reader without a letter. Takes no lock, so a signal handler may call it."""
        with contextlib.suppress(OSError):
            self._sender.send(b"\0")

    def drain(self) -> list[T]:
        with contextlib.suppress(BlockingIOError):
            self._receiver.recv(4096)
        with self._lock:
            messages = list(self._letters)
            self._letters.clear()
        return messages

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()
