"""Redis keeps two versions of a shard: too few, if one server commits much faster than another."""

from __future__ import annotations

import threading

from psa_store.job.config import JobConfig
from psa_store.server.committer import Committer
from psa_store.server.messages import Committed, Lost
from psa_store.server.work import Work

_SLOW_S = 60.0
_FIRST = 10
"""The version that both commit at once."""


def plant() -> None:
    """Keep two; and let the owner of the last shard be slow with its second commit, until it is killed."""
    commit = Committer._commit

    def commit_slowly(self: Committer, work: Work) -> Committed | Lost | None:
        last = self._healing._layout.versioned[-1].index
        if last in work.owned_shards and work.version > _FIRST:
            threading.Event().wait(_SLOW_S)
        return commit(self, work)

    JobConfig.versions_kept = property(lambda self: 2)  # type: ignore[assignment,method-assign]
    Committer._commit = commit_slowly  # type: ignore[method-assign]
