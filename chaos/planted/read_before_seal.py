"""A controller reads the heads first, and seals later: what is committed in between is thrown away."""

from __future__ import annotations

import time
from collections.abc import Iterable

from psa_store.storage import Head, RedisStore

_BETWEEN_S = 3.0


def plant() -> None:
    """Have the seal return what was there before it, with time for others in between."""
    original = RedisStore.seal

    def seal(self: RedisStore, job: str, shards: Iterable[int], term: int, layout: str) -> list[Head]:
        listed = list(shards)
        before = self.heads(job, listed)
        if not any(head.manifests for head in before):
            return original(self, job, listed, term, layout)  # the job is being created: there is nothing to lose
        time.sleep(_BETWEEN_S)
        original(self, job, listed, term, layout)
        return before

    RedisStore.seal = seal  # type: ignore[method-assign]
