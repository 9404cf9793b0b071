"""A process outside the job that reads all the time, as a user of `psa.Store` would, and records what it saw.

It also records each change of the head of each shard, so that the checker can find a commit that came after a seal.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import psa_store as psa
from psa_store.checkpoint.reader import tensors_digest
from psa_store.errors import PsaError, UnknownJob, UsageError
from psa_store.job.layout import layout_from_json
from psa_store.storage import RedisStore
from psa_store.testing.journal import Journal

_HEADS_EVERY_S = 0.02
_LOAD_EVERY_S = 0.1
_PATIENCE_S = 0.5


def main(job: str, redis: str, journals: str) -> None:
    """Read until SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: ended.set())
    with closing(Journal(Path(journals), "reader", "0")) as journal:
        reader = _Reader(job, redis, journal)
        while not ended.wait(_HEADS_EVERY_S):
            reader.turn()


class _Reader:
    def __init__(self, job: str, redis: str, journal: Journal) -> None:
        self._job = job
        self._redis = redis
        self._journal = journal
        self._store = RedisStore(redis, timeout_s=_PATIENCE_S)
        self._heads: dict[int, str] = {}
        self._shards: list[int] = []
        self._load_at_s = 0.0

    def turn(self) -> None:
        """Read the heads; from time to time, load a version."""
        try:
            self._look()
            if self._shards and time.monotonic() >= self._load_at_s:
                self._load_at_s = time.monotonic() + _LOAD_EVERY_S
                self._load()
        except UnknownJob:
            self._shards = []  # Redis was wiped
        except UsageError:
            pass  # the version was dropped between the choice and the reading
        except PsaError as error:
            self._journal.record("failed", error=f"{type(error).__name__}: {error}")

    def _look(self) -> None:
        if not self._shards:
            found = self._store.read_job(self._job)
            if found is None:
                return
            self._shards = [shard.index for shard in layout_from_json(found[1]).shards]
        for head in self._store.heads(self._job, self._shards):
            manifests = [[each.version, each.term, each.nonce] for each in head.manifests]
            seen = f"{head.term} {manifests}"
            if self._heads.get(head.shard) != seen:
                self._heads[head.shard] = seen
                self._journal.record("head", shard=head.shard, term=head.term, manifests=manifests)

    def _load(self) -> None:
        with psa.Store(self._job, redis=self._redis) as store:
            version = store.version()
            self._journal.record("read", version=version, digest=tensors_digest(store.state_dict(version)))
