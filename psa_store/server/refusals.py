"""Refused connections: counted each, and told in the log once a second at most, however many there are."""

from __future__ import annotations

import time
from collections.abc import Callable

from psa_store import logs

_TELL_S = 1.0


class Refusals:
    """``count``: called for each. Used by one thread."""

    def __init__(self, count: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._clock = clock
        self._untold = 0
        self._last = ("", "", "")
        self._tell_at_s = clock()
        self._log = logs.get_logger()

    def note(self, peer: str, why: str, member: str = "") -> None:
        """A connection was refused, or ended for what the peer did."""
        self._count()
        self._untold += 1
        self._last = (peer, member, why)
        self.tell()

    def tell(self) -> None:
        """Log what has not been told, if the last time is a second ago: the last one, and how many there were."""
        if not self._untold or self._clock() < self._tell_at_s:
            return
        peer, member, why = self._last
        self._log.warning("refused a peer", peer=peer, member=member, why=why, refused=self._untold)
        self._untold = 0
        self._tell_at_s = self._clock() + _TELL_S
