"""Many shards in one stream: cut anywhere, refused in part, and nothing left over."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from chaos.proxy import Proxy
from psa_store.errors import (
    DependencyUnfit,
    DependencyUnreachable,
    Fenced,
    Rewound,
)
from psa_store.launch import PrivateRedis
from psa_store.storage import CHUNK_BYTES, Manifest, RedisStore
from psa_store.storage import commit as storage_commit
from tests.integration.storage.shards import (
    JOB,
    KEEP,
    LAYOUT,
    assert_committed_once,
    assert_no_garbage,
    become_a_replica,
    commit,
    commit_all,
    data,
    read,
    refuse_without_replicas,
    state_of,
)


def test_many_shards_are_committed_in_one_stream(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, range(3), 1, LAYOUT)
    for version in range(1, 6):
        manifests = commit_all(store, version, expect=version - 1 or None)
        assert [head.manifest(version) for head in store.heads(JOB, range(3))] == list(manifests.values())
    assert [[m.version for m in head.manifests] for head in store.heads(JOB, range(3))] == [[3, 4, 5]] * 3
    assert len(raw.keys("psa:{job:*")) == 3 * (1 + KEEP * 2)


@pytest.mark.parametrize("size", [100, 300_000])
def test_a_commit_survives_a_cut_anywhere(
    proxy: Proxy, distant: RedisStore, store: RedisStore, raw: redis.Redis, size: int
) -> None:
    """In the middle of a value, of a flip, or of an answer: each shard is committed exactly once, and whole."""
    cuts = [(proxy.cut_requests_after, max(97, size // 3)), (proxy.cut_replies_after, 13)]
    for cut, stride in cuts:
        for count in itertools.count(1, stride):
            raw.flushdb()
            store.seal(JOB, range(3), 1, LAYOUT)
            distant.heads(JOB, range(3))
            proxy.fired = 0
            cut(count)
            outcomes = commit_all(distant, 7, size=size)
            if not proxy.fired:
                break
            assert_committed_once(store, raw, 7, size, outcomes)
        assert count > 5 * stride


def test_a_commit_over_a_link_that_stays_cut_is_unreachable(
    proxy: Proxy, distant: RedisStore, store: RedisStore, raw: redis.Redis
) -> None:
    store.seal(JOB, range(3), 1, LAYOUT)
    distant.heads(JOB, [0])
    proxy.cut_before(b"$3\r\nSET\r\n", forever=True)
    with pytest.raises(DependencyUnreachable, match=str(proxy.port)):
        commit_all(distant, 1)
    assert proxy.fired and not raw.keys("psa:{job:*}:1:*")


def test_a_fenced_shard_does_not_stop_the_others(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, range(3), 1, LAYOUT)
    (sealed,) = store.seal(JOB, [1], 2, LAYOUT)
    outcomes = commit_all(store, 1)
    assert isinstance(outcomes[1], Fenced) and "term 2 owns the shard and ours is 1" in str(outcomes[1])
    assert store.heads(JOB, range(3)) == [
        replace(sealed, shard=0, term=1, manifests=(outcomes[0],)),
        sealed,
        replace(sealed, shard=2, term=1, manifests=(outcomes[2],)),
    ]
    assert raw.keys("psa:{job:1}:*") == [b"psa:{job:1}:head"]


def test_a_rewound_shard_does_not_stop_the_others(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, range(3), 1, LAYOUT)
    commit_all(store, 1)
    raw.delete("psa:{job:1}:head")
    outcomes = commit_all(store, 2, expect=1)
    assert isinstance(outcomes[1], Rewound)
    assert [len(head.manifests) for head in store.heads(JOB, range(3))] == [2, 0, 2]


def test_a_flip_without_its_chunks_writes_them_again(
    store: RedisStore, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.seal(JOB, range(3), 1, LAYOUT)
    flip, lost = storage_commit.flip, []

    def lose_a_chunk(job: str, head: Any, manifest: Manifest, *others: Any) -> Any:
        if head.shard == 1 and not lost:
            lost.append(manifest.chunk_keys(job, 1)[0])
            while not raw.delete(lost[0]):
                pass
        return flip(job, head, manifest, *others)

    monkeypatch.setattr(storage_commit, "flip", lose_a_chunk)
    assert_committed_once(store, raw, 1, 100, commit_all(store, 1))
    assert lost


def test_functions_that_are_flushed_in_the_middle_of_a_commit_are_loaded_again(
    store: RedisStore, raw: redis.Redis
) -> None:
    store.seal(JOB, range(8), 1, LAYOUT)
    done = []
    for shard, _ in store.commit_each(JOB, 1, 1, [state_of(shard, 1) for shard in range(8)], keep=KEEP):
        done.append(shard)
        raw.function_flush()
    assert sorted(done) == list(range(8)) and all(head.manifest(1) for head in store.heads(JOB, range(8)))


def test_an_interrupted_commit_leaves_connections_that_can_be_used(url: str, raw: redis.Redis) -> None:
    with closing(RedisStore(url, timeout_s=1.0, connections_max=2)) as store:
        store.seal(JOB, range(9), 1, LAYOUT)
        for version in range(1, 6):
            states = [state_of(shard, version, size=200_000) for shard in range(9)]
            with closing(store.commit_each(JOB, 1, version, states, keep=KEEP)) as outcomes:
                shard, manifest = next(outcomes)
            assert store.heads(JOB, [0])[0].manifest(version) == manifest and shard == 0
        for head in store.heads(JOB, range(9)):
            for each in head.manifests:
                places = {"param": memoryview(bytearray(200_000))}
                store.load(JOB, head.shard, each, places)
                assert places["param"] == data(200_000, each.version)


def test_what_a_flip_dropped_expires_if_the_writer_dies(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, range(9), 1, LAYOUT)
    for version in range(1, 4):
        last = commit_all(store, version, 9)
    oldest = [store.heads(JOB, [0])[0].manifests[0].chunk_keys(JOB, 0)][0]
    assert [raw.ttl(key) for key in oldest] == [-1, -1] and last
    with closing(store.commit_each(JOB, 1, 4, [state_of(s, 4, expect=3) for s in range(9)], keep=KEEP)) as outcomes:
        next(outcomes)
    assert all(0 < raw.ttl(key) <= storage_commit.CHUNK_EXPIRY_S for key in oldest)


def test_a_sweep_spares_what_a_head_names(store: RedisStore, raw: redis.Redis) -> None:
    """A Redis that went back in time names old chunks again: a sweep that comes afterwards must not take them."""
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 1)
    raw.set("psa:{job:0}:orphan", "x", ex=100)
    swept = [*manifest.chunk_keys(JOB, 0), "psa:{job:0}:orphan", "psa:{job:0}:nothing"]
    raw.config_set("maxmemory", 1)  # it frees memory, so it must not be refused for want of it
    try:
        assert store._caller.functions([("psa_sweep", swept, [])]) == [1]
    finally:
        raw.config_set("maxmemory", 0)
    assert_no_garbage(store, raw)
    read(store, manifest)


def test_a_commit_frees_as_fast_as_it_writes(server: PrivateRedis, store: RedisStore, raw: redis.Redis) -> None:
    shards, size = 8, 2 * CHUNK_BYTES
    store.seal(JOB, range(shards), 1, LAYOUT)
    for version in range(1, KEEP + 1):
        commit_all(store, version, shards, size=size)
    with closing(redis.Redis.from_url(server.tcp_url)) as watcher:
        before = keyspace_bytes(watcher)
        held = []
        states = [state_of(shard, 9, expect=KEEP, size=size) for shard in range(shards)]
        for _ in store.commit_each(JOB, 1, 9, states, keep=KEEP):
            held.append(keyspace_bytes(watcher) - before)
    one_shard = 2 * size
    assert len(held) == shards and max(held) < 3 * one_shard, held
    assert keyspace_bytes(raw) - before < one_shard


def keyspace_bytes(redis_: redis.Redis) -> int:
    """What Redis has allocated, without what it has still to write to its log: that grows while the disk is busy."""
    memory = redis_.info("memory")
    return int(memory["used_memory"]) - int(memory["mem_aof_buffer"])


@pytest.mark.parametrize(("refuse", "why"), [(refuse_without_replicas, "NOREPLICAS"), (become_a_replica, "replica")])
def test_a_redis_that_begins_to_refuse_in_the_middle_of_a_commit_is_unfit(
    store: RedisStore,
    hasty: RedisStore,
    raw: redis.Redis,
    refuse: Callable[[redis.Redis], Callable[[], object]],
    why: str,
) -> None:
    store.seal(JOB, range(20), 1, LAYOUT)
    undo: Callable[[], object] = int
    done = []
    try:
        with pytest.raises(DependencyUnfit, match=why):
            for shard, _ in hasty.commit_each(JOB, 1, 1, [state_of(s, 1) for s in range(20)], keep=KEEP):
                if not done:
                    undo = refuse(raw)
                done.append(shard)
    finally:
        undo()
    assert 0 < len(done) < 20 and all(head.manifest(1) for head in store.heads(JOB, done))
    left = [shard for shard in range(20) if shard not in done]
    again = dict(store.commit_each(JOB, 1, 1, [state_of(shard, 1) for shard in left], keep=KEEP))
    assert list(again) == left and all(head.manifest(1) for head in store.heads(JOB, range(20)))


def test_a_redis_that_runs_full_in_the_middle_of_a_commit_keeps_no_rest_of_it(tmp_path: Path) -> None:
    private = PrivateRedis(tmp_path, {"maxmemory": "60mb"})
    private.start(120)
    try:
        with closing(RedisStore(private.url, timeout_s=5.0)) as store, redis.Redis.from_url(private.url) as raw:
            store.check()
            store.seal(JOB, range(4), 1, LAYOUT)
            done = {}
            states = [state_of(shard, 1, size=2 * CHUNK_BYTES) for shard in range(4)]
            with pytest.raises(DependencyUnfit, match="maxmemory"):
                for shard, manifest in store.commit_each(JOB, 1, 1, states, keep=KEEP):
                    done[shard] = manifest
            assert 0 < len(done) < 4
            assert [head.manifest(1) for head in store.heads(JOB, list(done))] == list(done.values())
            assert [key for key in raw.keys("psa:{job:*") if raw.ttl(key) != -1] == []
    finally:
        private.stop()
