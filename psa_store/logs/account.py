"""What a process could not read and set aside: each piece counts once, and is said once a second at most."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from psa_store.logs.setup import get_logger

T = TypeVar("T")

_KNOWN_MAX = 256
"""Pieces of damage that are remembered, so that each counts once."""
_SAY_EVERY_S = 1.0


class Account(Generic[T]):
    """Of one process and one store. Thread-safe. ``what``: what is set aside, as in "a znode"."""

    def __init__(self, what: str) -> None:
        self.count = 0
        """How often something was set aside."""
        self._what = what
        self._lock = threading.Lock()
        self._known: deque[Hashable] = deque(maxlen=_KNOWN_MAX)
        self._news: deque[T] = deque(maxlen=_KNOWN_MAX)
        self._said_at_s = float("-inf")

    def note(self, piece: T, mark: Hashable, *, where: str, why: str) -> None:
        """Count and log a piece of damage. ``mark``: the same for the same piece."""
        with self._lock:
            if mark in self._known:
                return
            self._known.append(mark)
            self._news.append(piece)
            self.count += 1
            now_s = time.monotonic()
            if now_s < self._said_at_s + _SAY_EVERY_S:
                return  # many at once: what is wrong stands in the status
            self._said_at_s = now_s
        get_logger().warning(f"{self._what} is set aside", where=where, why=why)

    def news(self) -> list[T]:
        """What was set aside since the last call."""
        with self._lock:
            return [self._news.popleft() for _ in range(len(self._news))]
