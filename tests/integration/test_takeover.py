"""How a term begins, against a real Redis and ZooKeeper, while the owners of the term before go on committing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

import pytest

from psa_store.cluster import Plan, Server, TakeOver
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, Fenced, Rewound
from psa_store.job.layout import Layout, TensorRole, TensorSpec, make_layout
from psa_store.server.takeover import take_over
from psa_store.storage import Head, Manifest, RedisStore, ShardState
from psa_store.testing.journal import Journal
from tests.harness import Site

KEEP = 3
NUMBERS = itertools.count()
LAYOUT = make_layout(
    [
        TensorSpec(("frozen",), (4,), "float32", TensorRole.FROZEN),
        TensorSpec(("here",), (1024,), "float32", TensorRole.TRAINED),
        TensorSpec(("there",), (1024,), "float32", TensorRole.TRAINED),
    ],
    shard_bytes=4096,
)
VERSIONED = [shard.index for shard in LAYOUT.versioned]
EVERY = [shard.index for shard in LAYOUT.shards]
LIVING, DEAD = Server("living", "", "", ""), Server("dead", "", "", "")


class Racing(RedisStore):
    """A store beside which others are always faster: they act after everything that it has read or sealed."""

    others: Callable[[], None] = staticmethod(lambda: None)

    def heads(self, job: str, shards: Iterable[int]) -> list[Head]:
        found = super().heads(job, shards)
        self.others()
        return found

    def seal(self, job: str, shards: Iterable[int], term: int, layout: str) -> list[Head]:
        found = super().seal(job, shards, term, layout)
        self.others()
        return found


class Scene:
    """A job of two servers in term 1, of which one has died."""

    def __init__(self, site: Site, store: RedisStore, racing: Racing, coordination: Coordination, job: str) -> None:
        self.job, self.store, self.racing, self.coordination = job, store, racing, coordination
        self.plan = Plan(
            term=coordination.next_term(),
            revision=1,
            resume=0,
            servers=(LIVING, DEAD),
            owners=tuple(int(index == VERSIONED[-1]) for index in EVERY),
            cells=("w",),
        )
        store.seal(job, EVERY, self.plan.term, LAYOUT.fingerprint)
        for shard in EVERY:
            self.commit(shard, 0)
        self.seen = coordination.write_plan(self.plan, None)

    def commit(self, shard: int, version: int, term: int | None = None) -> Manifest | Fenced | Rewound:
        data = memoryview(bytes([version]) * LAYOUT.shards[shard].size_bytes)
        state = ShardState(shard, {"param": ("float32", data)}, {}, None)
        ((_, outcome),) = self.store.commit_each(self.job, term or self.plan.term, version, [state], keep=KEEP)
        return outcome

    def take_over(self, layout: Layout = LAYOUT) -> Plan | None:
        action = TakeOver((LIVING,), (0,) * len(EVERY), ("w",), 1, "a test", (self.plan.term, self.plan.revision))
        return take_over(
            action,
            self.seen,
            job=self.job,
            layout=layout,
            coordination=self.coordination,
            store=self.racing,
            journal=Journal(None, "server", "s"),
        )

    def versions(self) -> list[list[int]]:
        return [[each.version for each in head.manifests] for head in self.store.heads(self.job, VERSIONED)]


@pytest.fixture
def scene(site: Site) -> Iterator[Scene]:
    job = f"takeover-{next(NUMBERS)}"
    coordination = Coordination(site.zookeeper, job, session_timeout_s=4.0, connect_timeout_s=30.0, wake=lambda: None)
    with site.store() as store, closing(Racing(site.redis, timeout_s=30.0)) as racing, coordination:
        store.check()
        yield Scene(site, store, racing, coordination, job)


def test_what_owners_commit_up_to_the_seal_is_where_the_term_begins(scene: Scene) -> None:
    """Also the owner that lives on, and commits what the dead one had committed just before."""
    for version in (10, 20):
        scene.commit(VERSIONED[-1], version)
    for shard in VERSIONED[:-1]:
        scene.commit(shard, 10)
    refused: set[int] = set()

    def living() -> None:
        for shard in VERSIONED[:-1]:
            if isinstance(scene.commit(shard, 20), Fenced):
                refused.add(shard)

    scene.racing.others = living
    begun = scene.take_over()
    assert begun is not None and begun.resume == 20, "it was durable everywhere before all shards were sealed"
    assert refused == set(VERSIONED[:-1]) and scene.versions() == [[0, 10, 20]] * len(VERSIONED)


def test_no_owner_commits_after_the_heads_were_read(scene: Scene) -> None:
    counts = {shard: itertools.count(1) for shard in VERSIONED}
    durable = dict.fromkeys(VERSIONED, 0)

    def all_owners() -> None:
        for shard in VERSIONED:
            version = next(counts[shard])
            if isinstance(scene.commit(shard, version), Manifest):
                durable[shard] = version

    scene.racing.others = all_owners
    begun = scene.take_over()
    assert begun is not None and begun.resume == min(durable.values()) > 0


def test_versions_that_only_some_shards_have_are_gone_when_the_term_begins(scene: Scene) -> None:
    """Else two histories would have versions of one number, and a later term might take some of each."""
    for shard in VERSIONED:
        scene.commit(shard, 10)
    scene.commit(VERSIONED[0], 20)
    begun = scene.take_over()
    assert begun is not None and begun.resume == 10 and scene.versions() == [[0, 10]] * len(VERSIONED)


def test_a_term_is_above_all_that_redis_knows(scene: Scene) -> None:
    """ZooKeeper was wiped, say, and counts from the beginning."""
    scene.store.seal(scene.job, [VERSIONED[0]], 7000, LAYOUT.fingerprint)
    begun = scene.take_over()
    assert begun is not None and begun.term > 7000
    assert {head.term for head in scene.store.heads(scene.job, EVERY)} == {begun.term}


def test_a_controller_that_is_overtaken_changes_and_publishes_nothing(scene: Scene) -> None:
    scene.commit(VERSIONED[0], 10)

    def another() -> None:
        if scene.store.heads(scene.job, EVERY)[0].term == scene.plan.term:
            return  # not sealed yet
        scene.racing.others = lambda: None
        scene.store.seal(scene.job, EVERY, scene.coordination.next_term(9000), LAYOUT.fingerprint)

    scene.racing.others = another
    read = scene.coordination.read_plan()
    assert scene.take_over() is None and scene.coordination.read_plan() == read
    assert scene.versions() == [[0, 10], [0]]


def test_shards_of_another_layout_begin_no_term(scene: Scene) -> None:
    other = make_layout(
        [
            TensorSpec(("frozen",), (4,), "float32", TensorRole.FROZEN),
            TensorSpec(("here",), (1024,), "float32", TensorRole.TRAINED),
            TensorSpec(("elsewhere",), (1024,), "float32", TensorRole.TRAINED),
        ],
        shard_bytes=4096,
    )
    with pytest.raises(DataIntegrity, match="written with another layout"):
        scene.take_over(other)


def test_without_a_common_version_no_term_begins_and_nothing_is_lost(scene: Scene) -> None:
    scene.store.trim(scene.job, VERSIONED, scene.plan.term, -1)
    for shard, version in zip(VERSIONED, (10, 20), strict=True):
        scene.commit(shard, version)
    with pytest.raises(DataIntegrity, match="no version is common to all shards"):
        scene.take_over()
    assert scene.versions() == [[10], [20]]
