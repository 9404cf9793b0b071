"""Servers with which the key cannot be proved: said once, and the end of a worker that has never proved it."""

from __future__ import annotations

import time

from psa_store import logs
from psa_store.errors import Unproved, UsageError

_LASTS_S = 15.0


class KeyWatch:
    """What the tries to connect to servers came to. Used by the thread that connects."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        """Since when each try has failed for the key; None: the last one has not."""
        self._was_proved = False
        self._log = logs.get_logger()

    def proved(self) -> None:
        """A server was connected to."""
        self._since_s, self._was_proved = None, True

    def unreachable(self) -> None:
        """A server could not be reached, which says nothing of the key."""
        self._since_s = None

    def failed(self, server: str, error: Unproved) -> None:
        """The key, or TLS, is another one there.

        Raises:
            UsageError: that lasts, and no server has ever proved this key. Not sooner, and not later in training: any
                process may listen where a server has died, and say so.
        """
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
            self._log.error("a server is not connected to", server=server, why=str(error))
        elif not self._was_proved and now_s > self._since_s + _LASTS_S:
            raise UsageError(f"server {server}: {error}") from error
