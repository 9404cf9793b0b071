"""A version is said to be durable when its commit begins."""

from __future__ import annotations

import threading

from psa_store.server.committer import Committer
from psa_store.server.messages import Committed
from psa_store.server.work import Work

_LATER_S = 0.05
"""The acknowledgement leaves before the first chunk is written, whichever thread is faster."""


def plant() -> None:
    """Make the committer report to the event loop before it has committed."""
    original = Committer.submit

    def submit(self: Committer, work: Work) -> None:
        self._post(Committed(work.term, work.version, {}))
        threading.Timer(_LATER_S, original, (self, work)).start()

    Committer.submit = submit  # type: ignore[method-assign]
