"""A flip that came to nothing is taken for done, if the head has that version from an earlier commit."""

from __future__ import annotations

from dataclasses import replace

from psa_store.server.committer import Committer
from psa_store.server.messages import Committed, Lost
from psa_store.server.work import Work
from psa_store.storage import Head, Manifest, ShardState
from psa_store.storage import commit as storage_commit
from psa_store.storage.commit import Commit
from psa_store.storage.library import FunctionCall


def plant() -> None:
    """Have every version committed twice, the second time on a head that has changed since it was read."""
    commit, flip, settled = Committer._commit, storage_commit.flip, Commit._settled

    def commit_twice(self: Committer, work: Work) -> Committed | Lost | None:
        first = commit(self, work)
        return commit(self, work) if isinstance(first, Committed) else first

    def flip_another(job: str, head: Head, manifest: Manifest, keep: int, expect: int | None) -> FunctionCall:
        there = head.manifest(manifest.version) is not None
        return flip(job, replace(head, manifests=()) if there else head, manifest, keep, expect)

    def settle(self: Commit, state: ShardState, manifest: Manifest) -> object:
        (head,) = self._heads([state.shard])
        return manifest if head.manifest(self._version) is not None else settled(self, state, manifest)

    Committer._commit = commit_twice  # type: ignore[method-assign]
    storage_commit.flip = flip_another
    Commit._settled = settle  # type: ignore[assignment,method-assign]
