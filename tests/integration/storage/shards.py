"""Shards of one job: how these tests commit and read them, and how they know that nothing else is left."""

from __future__ import annotations

from collections.abc import Callable

import redis

from psa_store.errors import (
    Fenced,
    Rewound,
)
from psa_store.storage import Manifest, RedisStore, ShardState
from psa_store.storage import commit as storage_commit

JOB = "job"
LAYOUT = "f" * 64
KEEP = 3


def data(size: int, fill: int) -> memoryview:
    return memoryview(bytes([fill]) * size)


def commit(
    store: RedisStore, version: int, *, term: int = 1, expect: int | None = None, size: int = 100, shard: int = 0
) -> Manifest:
    arrays = {"param": ("float32", data(size, version)), "momentum": ("float32", data(size, version + 100))}
    return store.commit(JOB, shard, term, version, arrays, {"opt_step": version}, keep=KEEP, expect=expect)


def state_of(shard: int, version: int, *, expect: int | None = None, size: int = 100) -> ShardState:
    arrays = {"param": ("float32", data(size, version)), "momentum": ("float32", data(size, version + 100))}
    return ShardState(shard, arrays, {"opt_step": version}, expect)


def write_chunks(store: RedisStore, manifest: Manifest) -> None:
    storage_commit.write_chunks(store._caller, JOB, manifest, state_of(0, 1))


def assert_no_garbage(store: RedisStore, raw: redis.Redis) -> None:
    """Every permanent key of the shard is its head or a chunk that the head names, and none of these is missing."""
    (head,) = store.heads(JOB, [0])
    named = {key for manifest in head.entries().values() for key in manifest.chunk_keys(JOB, 0)}
    permanent = {key.decode() for key in raw.keys("psa:{job:0}:*") if raw.ttl(key) == -1}
    assert permanent == named | {"psa:{job:0}:head"}


def read(store: RedisStore, manifest: Manifest, size: int = 100) -> dict[str, bytearray]:
    places = {"param": bytearray(size), "momentum": bytearray(size)}
    store.load(JOB, 0, manifest, {name: memoryview(place) for name, place in places.items()})
    return places


def commit_all(
    store: RedisStore, version: int, shards: int = 3, *, term: int = 1, expect: int | None = None, size: int = 100
) -> dict[int, Manifest | Fenced | Rewound]:
    states = [state_of(shard, version, expect=expect, size=size) for shard in range(shards)]
    return dict(store.commit_each(JOB, term, version, states, keep=KEEP))


def assert_committed_once(store: RedisStore, raw: redis.Redis, version: int, size: int, outcomes: object) -> None:
    """All heads hold this version and no other, with these manifests and bytes; nothing else is permanent."""
    heads = store.heads(JOB, range(3))
    assert {head.shard: head.manifests for head in heads} == {s: (m,) for s, m in outcomes.items()}  # type: ignore[attr-defined]
    named = {f"psa:{{job:{shard}}}:head" for shard in range(3)}
    for head in heads:
        places = {"param": bytearray(size), "momentum": bytearray(size)}
        store.load(JOB, head.shard, head.manifests[0], {name: memoryview(place) for name, place in places.items()})
        assert places == {"param": bytearray(data(size, version)), "momentum": bytearray(data(size, version + 100))}
        named |= set(head.manifests[0].chunk_keys(JOB, head.shard))
    assert {key.decode() for key in raw.keys("psa:{job:*") if raw.ttl(key) == -1} == named


def refuse_without_replicas(raw: redis.Redis) -> Callable[[], object]:
    raw.config_set("min-replicas-to-write", 1)
    return lambda: raw.config_set("min-replicas-to-write", 0)


def become_a_replica(raw: redis.Redis) -> Callable[[], object]:
    raw.replicaof("127.0.0.1", "1")
    return lambda: raw.replicaof("NO", "ONE")
