"""Where the text of a znode becomes a document, or is set aside: the one place that decides what is believed.

Any process that reaches ZooKeeper may have written a znode: a person, a script, a newer release. What cannot be read is
:class:`Damaged`, a value like any other: it is counted, and written again by a process that knows what it should be.
Only this package may use it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from psa_store import logs
from psa_store.coordination.znodes import Znode
from psa_store.errors import DataIntegrity
from psa_store.job.document import Damaged

T = TypeVar("T")

_KNOWN_MAX = 256
"""Pieces of damage that are remembered, so that each counts once."""
_SAY_EVERY_S = 1.0


class Reader:
    """Reads znodes of one job, and keeps account of what it set aside. Thread-safe."""

    def __init__(self) -> None:
        self.count = 0
        """How often something was set aside."""
        self._lock = threading.Lock()
        self._known: deque[tuple[str, int, float]] = deque(maxlen=_KNOWN_MAX)
        self._news: deque[Damaged] = deque(maxlen=_KNOWN_MAX)
        self._said_at_s = float("-inf")

    def read(self, node: Znode, parse: Callable[[str], T], *, ephemeral: bool = False) -> T | Damaged:
        """What a znode says. ``ephemeral``: only a session that lives may say it."""
        try:
            if ephemeral and not node.owner:
                raise DataIntegrity("no process keeps it: it is not ephemeral. Delete it")
            return parse(node.text)
        except DataIntegrity as error:
            return self.set_aside(node, str(error))

    def set_aside(self, node: Znode, why: str) -> Damaged:
        """Count and log a znode that cannot be what it should be."""
        damaged = Damaged(node.path, why, node.version, kept=bool(node.owner))
        mark = node.path, node.version, node.modified_s
        with self._lock:
            if mark in self._known:
                return damaged
            self._known.append(mark)
            self._news.append(damaged)
            self.count += 1
            now_s = time.monotonic()
            if now_s < self._said_at_s + _SAY_EVERY_S:
                return damaged  # many at once: what is wrong stands in the status
            self._said_at_s = now_s
        logs.get_logger().warning("a znode is set aside", where=node.path, why=why)
        return damaged

    def news(self) -> list[Damaged]:
        """What was set aside since the last call."""
        with self._lock:
            return [self._news.popleft() for _ in range(len(self._news))]
