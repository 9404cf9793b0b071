"""A version is said to be durable when its commit begins."""

from __future__ import annotations

from psa_store.server.committer import Committer, Work
from psa_store.server.letters import Committed


def plant() -> None:
    """Have the committer tell the engine at once what it has yet to do."""
    original = Committer.submit

    def submit(self: Committer, work: Work) -> None:
        original(self, work)
        self._post(Committed(work.epoch, work.version, {}))

    Committer.submit = submit  # type: ignore[method-assign]
