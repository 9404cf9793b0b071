"""Servers with which the key cannot be proved: said, and the end of a worker that has never proved it."""

from __future__ import annotations

import time

from psa_store.errors import Unproved, UsageError
from psa_store.logs import Waits

_LASTS_S = 15.0


class KeyWatch:
    """What the tries to connect to servers came to. Used by the thread that connects."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._since_s: float | None = None
        """Since when each try has failed for the key; None: the last one has not."""
        self._was_proved = False

    def proved(self) -> None:
        """A server was connected to."""
        self._since_s, self._was_proved = None, True
        self._waits.over("key")

    def unreachable(self) -> None:
        """A server could not be reached, which says nothing of the key."""
        self._since_s = None
        self._waits.over("key")

    def failed(self, server: str, error: Unproved) -> None:
        """The key, or TLS, is another one there.

        Raises:
            UsageError: that lasts, and no server has ever proved this key. Not sooner, and not later in training: any
                process may listen where a server has died, and say so.
        """
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
        self._waits.on("key", f"server {server} to prove the key", str(error), say_after_s=0.0)
        if not self._was_proved and now_s > self._since_s + _LASTS_S:
            raise UsageError(f"server {server}: {error}") from error
