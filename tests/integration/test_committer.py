"""What a server does between commits: what Redis has lost of the present term is written again, and nothing older."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from psa_store.cluster import ProcessRole
from psa_store.errors import DependencyUnreachable
from psa_store.job.config import JobConfig
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.job.wire_layout import WireLayout
from psa_store.logs import Waits
from psa_store.observe.metrics import Metrics
from psa_store.optim import SGD
from psa_store.server.committer import Committer
from psa_store.server.messages import Committed, Lost
from psa_store.server.shard import OwnedShard
from psa_store.server.work import Work
from psa_store.storage import RedisStore, keys
from psa_store.wire import SharedMemory
from tests.harness import Site

NUMBERS = itertools.count()
LAYOUT = make_layout([TensorSpec(("weight",), (8,), "float32", TensorRole.TRAINED)])
PATIENCE_S = 120.0


class AwayForCommits(RedisStore):
    """Redis answers everything but commits, while ``away``."""

    away = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.refused = threading.Event()
        super().__init__(*arguments, **named)

    def commit_each(self, *arguments: Any, **named: Any) -> Any:
        if self.away:
            self.refused.set()
            raise DependencyUnreachable("a test has cut the way")
        return super().commit_each(*arguments, **named)


class Scene:
    """A server of one shard, as its committer sees it. ``others``: a way to Redis that is always there."""

    def __init__(self, store: AwayForCommits, others: RedisStore, job: str) -> None:
        self.store, self._others, self.job = store, others, job
        config = JobConfig(job, 1, 0, SGD().to_dict(), LAYOUT.fingerprint)
        store.create_job(job, config.to_json(), LAYOUT.to_json())
        self.outcomes: queue.SimpleQueue[Committed | Lost] = queue.SimpleQueue()
        metrics = Metrics(ProcessRole.SERVER, "server")
        self.committer = Committer(store, config, LAYOUT, self.outcomes.put, metrics, Waits(), rests=False)

    def term(self, number: int, version: int) -> Work:
        """A term begins: Redis has its shards at this version."""
        memory = SharedMemory.create("test", LAYOUT.arena_bytes)
        owned = OwnedShard(LAYOUT.shards[0], LAYOUT, WireLayout(LAYOUT), SGD(), memory)
        owned.param.fill_(float(version))
        owned.take_snapshot()
        self._others.seal(self.job, [0], number, LAYOUT.fingerprint)
        owned.committed = self._others.commit(self.job, 0, number, version, *owned.snapshot(), keep=3, expect=None)
        self.committer.begin(number)
        work = Work(number, version, {0: owned}, {})
        self.committer.adopt(work)
        return work

    def versions(self) -> list[tuple[int, int]]:
        """What Redis has, each with the term that wrote it."""
        (head,) = self._others.heads(self.job, [0])
        return [(each.version, each.term) for each in head.manifests]

    def lose(self) -> None:
        """Redis has lost everything of the shard."""
        self._others._client.delete(keys.head(self.job, 0))

    def wait_for(self, versions: list[tuple[int, int]]) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while self.versions() != versions:
            assert time.monotonic() < until_s, self.versions()
            time.sleep(0.02)  # Redis sends no event of a commit: it is looked for until the deadline


@pytest.fixture
def scene(site: Site) -> Iterator[Scene]:
    with closing(AwayForCommits(site.redis, timeout_s=30.0)) as store, site.store() as others:
        store.check()
        scene = Scene(store, others, f"committer-{next(NUMBERS)}")
        with closing(scene.committer):
            yield scene


def test_what_redis_loses_before_the_first_commit_of_a_term_is_written_again(scene: Scene) -> None:
    scene.term(1, 10)
    scene.lose()
    scene.wait_for([(10, 1)])


def test_a_commit_that_its_term_does_not_outlive_leaves_what_the_next_one_began_with(scene: Scene) -> None:
    """It was under way when the next term began; what is written again is that with which this one began."""
    work = scene.term(1, 10)
    assert scene.committer.reserve()
    scene.store.away = True
    scene.committer.submit(Work(1, 20, work.owned_shards, {}))
    assert scene.store.refused.wait(PATIENCE_S)
    scene.term(2, 10)
    scene.store.away = False
    scene.lose()
    scene.wait_for([(10, 2)])
    assert scene.outcomes.empty(), "nothing came of it"
