"""The Redis door, against a real Redis: the fence, the flip, what a crash leaves, and what damage looks like."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from chaos.proxy import Proxy
from psa_store.errors import (
    DataIntegrity,
    DependencyUnfit,
    DependencyUnreachable,
    Fenced,
    JobMismatch,
    Rewound,
    UsageError,
)
from psa_store.launch import PrivateRedis
from psa_store.storage import CHUNK_BYTES, Manifest, RedisStore, ShardState
from psa_store.storage import commit as storage_commit
from psa_store.storage.stream import Command

JOB = "job"
LAYOUT = "f" * 64
KEEP = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    private = PrivateRedis(tmp_path_factory.mktemp("redis"), {"requirepass": "sesame"})
    private.start(120)
    yield private
    private.stop()


@pytest.fixture(params=["tcp", "unix"])
def url(server: PrivateRedis, request: pytest.FixtureRequest) -> str:
    if request.param == "tcp":
        return server.tcp_url.replace("redis://", "redis://:sesame@")
    return server.url.replace("unix://", "unix://:sesame@")


@pytest.fixture
def raw(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def store(url: str, raw: redis.Redis) -> Iterator[RedisStore]:
    with closing(RedisStore(url, timeout_s=5.0)) as store:
        store.check()
        yield store


@pytest.fixture
def proxy(server: PrivateRedis) -> Iterator[Proxy]:
    """A link to Redis that can be cut."""
    with closing(Proxy(server.address)) as proxy:
        yield proxy


@pytest.fixture
def distant(proxy: Proxy) -> Iterator[RedisStore]:
    """A store at the other end of ``proxy``."""
    with closing(RedisStore(f"redis://:sesame@127.0.0.1:{proxy.port}", timeout_s=1.0)) as store:
        yield store


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


@pytest.mark.parametrize("size", [4, CHUNK_BYTES, 2 * CHUNK_BYTES + 4])
def test_what_is_committed_is_read_back(store: RedisStore, size: int) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 7, size=size)
    (head,) = store.heads(JOB, [0])
    assert head.manifest(7) == manifest and head.layout == LAYOUT and head.term == 1
    assert read(store, manifest, size) == {"param": bytearray(data(size, 7)), "momentum": bytearray(data(size, 107))}
    assert manifest.scalars == {"opt_step": 7}


def test_an_old_term_is_refused_and_changes_nothing(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 4, LAYOUT)
    commit(store, 1, term=4)
    (sealed,) = store.seal(JOB, [0], 5, LAYOUT)
    with pytest.raises(Fenced, match="term 5 owns the shard and ours is 4"):
        commit(store, 2, term=4, expect=1)
    with pytest.raises(Fenced):
        store.seal(JOB, [0], 4, LAYOUT)
    with pytest.raises(Fenced):
        store.trim(JOB, [0], 4, 0)
    assert store.heads(JOB, [0]) == [sealed]
    assert commit(store, 2, term=5, expect=1).term == 5


def test_terms_beyond_the_precision_of_lua_numbers_are_told_apart(store: RedisStore) -> None:
    store.seal(JOB, [0], 2**53 + 1, LAYOUT)
    with pytest.raises(Fenced):
        commit(store, 1, term=2**53)


def test_of_two_owners_only_the_newer_one_gets_through(store: RedisStore) -> None:
    store.seal(JOB, [0], 1, LAYOUT)

    def older() -> int:
        done = 0
        try:
            for version in range(1, 200):
                commit(store, version, term=1, size=4)
                done = version
        except Fenced:
            pass
        return done

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(older)
        while not (seen := store.heads(JOB, [0])[0].manifests):
            pass
        (sealed,) = store.seal(JOB, [0], 2, LAYOUT)
        last = running.result()
    assert sealed.manifests[-1].version == last >= seen[-1].version
    assert store.heads(JOB, [0]) == [sealed]


def test_old_versions_and_their_chunks_are_dropped(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    last = None
    for version in range(1, 8):
        commit(store, version, expect=last)
        last = version
    (head,) = store.heads(JOB, [0])
    assert [manifest.version for manifest in head.manifests] == [5, 6, 7]
    assert len(raw.keys("psa:{job:0}:*")) == 1 + KEEP * 2
    commit(store, 7, expect=7)  # the same version again replaces the former one
    assert len(raw.keys("psa:{job:0}:*")) == 1 + KEEP * 2
    store.trim(JOB, [0], 1, 5)
    assert len(raw.keys("psa:{job:0}:*")) == 1 + 2
    store.mark_corrupt(JOB, 0, 1, 5)
    assert len(raw.keys("psa:{job:0}:*")) == 1


def test_chunks_expire_until_a_commit_makes_them_permanent(
    proxy: Proxy, distant: RedisStore, store: RedisStore, raw: redis.Redis
) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    proxy.cut_before(b"psa_commit", forever=True)
    with pytest.raises(DependencyUnreachable):
        commit(distant, 1)
    orphans = raw.keys("psa:{job:0}:1:*")
    assert len(orphans) == 2 and all(0 < raw.ttl(key) <= storage_commit.CHUNK_EXPIRY_S for key in orphans)
    manifest = commit(store, 1)
    assert all(raw.ttl(key) == -1 for key in manifest.chunk_keys(JOB, 0))


def test_a_write_that_arrives_late_does_not_make_a_committed_chunk_expire(store: RedisStore, raw: redis.Redis) -> None:
    """A connection that broke may still deliver its SET after another one has repeated it and the commit is done."""
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 1)
    write_chunks(store, manifest)
    assert [raw.ttl(key) for key in manifest.chunk_keys(JOB, 0)] == [-1, -1]


def test_a_flip_that_arrives_late_does_not_undo_a_newer_one(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    commit(store, 1)
    (seen,) = store.heads(JOB, [0])
    newer = commit(store, 1, expect=1)  # same version, so the same fields: only the nonce tells them apart
    late = replace(newer, nonce=secrets.token_hex(4))
    write_chunks(store, late)
    assert store._caller.functions([storage_commit.flip(JOB, seen, late, KEEP, 1)]) == [[b"changed"]]
    assert store.heads(JOB, [0])[0].manifests == (newer,)
    assert_no_garbage(store, raw)


def test_a_flip_decided_on_an_older_head_is_refused(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    (seen,) = store.heads(JOB, [0])
    first = commit(store, 1)  # not in `seen`: a flip that does not know it could not drop it when its turn comes
    late = replace(first, version=2, nonce=secrets.token_hex(4))
    write_chunks(store, late)
    assert store._caller.functions([storage_commit.flip(JOB, seen, late, KEEP, None)]) == [[b"changed"]]
    assert store.heads(JOB, [0])[0].manifests == (first,)
    assert_no_garbage(store, raw)


def test_dropping_a_version_that_was_replaced_meanwhile_leaves_no_garbage(
    store: RedisStore, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    commit(store, 1)
    stale = store.heads(JOB, [0])
    commit(store, 1, expect=1)
    heads, answers = store.heads, [stale]
    monkeypatch.setattr(store, "heads", lambda job, shards: answers.pop() if answers else heads(job, shards))
    store.mark_corrupt(JOB, 0, 1, 1)
    assert store.heads(JOB, [0])[0].manifests == () and not answers
    assert_no_garbage(store, raw)


def test_a_redis_that_went_back_in_time_is_noticed(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 3, LAYOUT)
    commit(store, 1, term=3)
    with pytest.raises(Rewound):
        commit(store, 3, term=3, expect=2)
    raw.delete("psa:{job:0}:head")
    with pytest.raises(Rewound):
        commit(store, 3, term=3, expect=1)
    assert store.heads(JOB, [0])[0].manifests == ()


def test_damage_is_named(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 1)
    chunk = manifest.chunk_keys(JOB, 0)[1]
    raw.setrange(chunk, 50, b"\0")
    with pytest.raises(DataIntegrity, match="job 'job', shard 0, version 1, section momentum, chunk 0: damaged"):
        read(store, manifest)
    raw.append(chunk, b"x")
    with pytest.raises(DataIntegrity, match="101 bytes stored, 100 expected"):
        read(store, manifest)
    raw.delete(chunk)
    with pytest.raises(DataIntegrity, match="chunk 0: missing"):
        read(store, manifest)
    raw.hset("psa:{job:0}:head", "v:" + "0" * 19 + "9", "no manifest")
    with pytest.raises(DataIntegrity, match="shard 0: the head in Redis cannot be read"):
        store.heads(JOB, [0])


def test_flushed_functions_are_loaded_again(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    raw.function_flush()
    assert commit(store, 1).version == 1


def test_a_flip_without_an_answer_in_time_is_looked_up(
    server: PrivateRedis, url: str, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(RedisStore(url, timeout_s=0.5)) as store:
        store.seal(JOB, [0], 1, LAYOUT)
        flip, flips = storage_commit.flip, []
        wake = threading.Timer(0.7, os.kill, (server.pid, signal.SIGCONT))

        def into_a_pause(*arguments: Any) -> Any:
            flips.append(arguments)
            if len(flips) == 1:
                os.kill(server.pid, signal.SIGSTOP)
                wake.start()
            return flip(*arguments)

        monkeypatch.setattr(storage_commit, "flip", into_a_pause)
        try:
            manifest = commit(store, 1)
        finally:
            os.kill(server.pid, signal.SIGCONT)
            wake.join()
        assert store.heads(JOB, [0])[0].manifests == (manifest,)
    assert_no_garbage(store, raw)


def test_a_commit_whose_chunks_keep_vanishing_gives_up(
    store: RedisStore, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sealed,) = store.seal(JOB, [0], 1, LAYOUT)
    monkeypatch.setattr(storage_commit, "_set", lambda key, part: Command(("ECHO", key)))
    with pytest.raises(DependencyUnreachable, match="job 'job', shard 0: version 1"):
        commit(store, 1)
    assert store.heads(JOB, [0]) == [sealed]


def test_a_load_does_not_make_redis_hold_a_second_copy(server: PrivateRedis, store: RedisStore) -> None:
    size = 16 * CHUNK_BYTES
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 1, size=size)
    with closing(redis.Redis.from_url(server.tcp_url, password="sesame")) as watcher:
        before = watcher.info("memory")["used_memory"]
        watched = [before]
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                watched.append(watcher.info("memory")["used_memory"])

        thread = threading.Thread(target=watch, name="watch")
        thread.start()
        for _ in range(3):
            read(store, manifest, size)
        done.set()
        thread.join()
    assert len(watched) > 10 and max(watched) - before < 6 * CHUNK_BYTES


def test_the_first_creator_of_a_job_wins(store: RedisStore) -> None:
    assert store.read_job(JOB) is None
    store.create_job(JOB, "{}", "[]")
    store.create_job(JOB, "{}", "[]")
    with pytest.raises(JobMismatch):
        store.create_job(JOB, '{"other": 1}', "[]")
    assert store.read_job(JOB) == ("{}", "[]") and store.jobs() == [JOB]
    store.seal(JOB, [0, 1], 1, LAYOUT)
    commit(store, 1)
    store.delete_job(JOB, 2)
    assert store.jobs() == [] and store.read_job(JOB) is None


def test_a_job_half_created_or_half_deleted_is_not_listed(store: RedisStore, raw: redis.Redis) -> None:
    store.create_job(JOB, "{}", "[]")
    raw.delete("psa:{job}:config", "psa:{job}:layout")
    assert store.jobs() == []
    store.create_job(JOB, "{}", "[]")
    assert store.jobs() == [JOB]


def refuse_without_replicas(raw: redis.Redis) -> Callable[[], object]:
    raw.config_set("min-replicas-to-write", 1)
    return lambda: raw.config_set("min-replicas-to-write", 0)


def become_a_replica(raw: redis.Redis) -> Callable[[], object]:
    raw.replicaof("127.0.0.1", "1")
    return lambda: raw.replicaof("NO", "ONE")


@pytest.mark.parametrize(("refuse", "why"), [(refuse_without_replicas, "NOREPLICAS"), (become_a_replica, "replica")])
def test_a_redis_that_refuses_writes_is_unfit_at_every_door(
    store: RedisStore, raw: redis.Redis, refuse: Callable[[redis.Redis], Callable[[], object]], why: str
) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    undo = refuse(raw)
    try:
        for write in (lambda: commit(store, 1), lambda: store.seal(JOB, [0], 2, LAYOUT)):
            with pytest.raises(DependencyUnfit, match=why) as caught:
                write()
            assert "sesame" not in str(caught.value)
    finally:
        undo()
    assert commit(store, 1).version == 1


def test_a_foreign_key_in_place_of_a_head_is_no_full_redis(store: RedisStore, raw: redis.Redis) -> None:
    raw.set("psa:{BLOOM:0}:head", "x")
    for touch in (lambda: store.heads("BLOOM", [0]), lambda: store.seal("BLOOM", [0], 1, LAYOUT)):
        with pytest.raises(DependencyUnfit, match="WRONGTYPE") as caught:
            touch()
        assert "maxmemory" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@127.0.0.1:1",
        "redis://:hun/ter2@127.0.0.1:1",
        "redis://user:hun#ter2@127.0.0.1:1",
        "redis://user:hun@ter2@127.0.0.1:1",
        "redis://127.0.0.1:1/0?password=hunter2",
        "unix://:hunter2@/nowhere.sock",
    ],
)
def test_no_message_shows_a_password(url: str) -> None:
    with (
        pytest.raises((UsageError, DependencyUnreachable)) as caught,
        closing(RedisStore(url, timeout_s=0.2)) as store,
    ):
        store.check()
    shown = f"{caught.value}{caught.value.__cause__}"
    assert "hun" not in shown and "ter2" not in shown
    assert "127.0.0.1:1" in shown or "/nowhere.sock" in shown


def test_a_redis_without_functions_is_unfit(tmp_path: Path) -> None:
    private = PrivateRedis(tmp_path, {"rename-command": 'FUNCTION ""'})
    private.start(120)
    try:
        with (
            closing(RedisStore(private.url, timeout_s=5.0)) as store,
            pytest.raises(DependencyUnfit, match="no functions"),
        ):
            store.check()
    finally:
        private.stop()


def test_a_restarted_redis_is_found_again(server: PrivateRedis, store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    commit(store, 1)
    before = store.server_run_id()
    while raw.info("persistence")["aof_buffer_length"]:
        pass  # while it syncs, Redis keeps in its memory what comes for the log, for two seconds at most
    server.kill()
    server.start(120)
    assert commit(store, 2, expect=1).version == 2
    assert store.server_run_id() != before


def test_an_unreachable_redis_is_named_in_time_and_without_its_password() -> None:
    with closing(RedisStore("redis://user:hunter2@127.0.0.1:1/0", timeout_s=1.0)) as store:
        started_s = time.monotonic()
        with pytest.raises(DependencyUnreachable, match=r"127\.0\.0\.1:1") as caught:
            store.check()
    assert "hunter2" not in str(caught.value) and time.monotonic() - started_s < 3.0


def test_an_evicting_redis_is_unfit(tmp_path: Path) -> None:
    private = PrivateRedis(tmp_path, {"maxmemory": "100mb", "maxmemory-policy": "volatile-lru"})
    private.start(120)
    try:
        with (
            closing(RedisStore(private.url, timeout_s=5.0)) as store,
            pytest.raises(DependencyUnfit, match="volatile-lru"),
        ):
            store.check()
    finally:
        private.stop()


def test_a_full_redis_refuses_with_a_reason_and_keeps_what_it_has(tmp_path: Path) -> None:
    private = PrivateRedis(tmp_path, {"maxmemory": "24mb"})
    private.start(120)
    try:
        with closing(RedisStore(private.url, timeout_s=5.0)) as store:
            store.check()
            store.seal(JOB, [0], 1, LAYOUT)
            manifest = commit(store, 1, size=CHUNK_BYTES)
            with pytest.raises(DependencyUnfit, match="maxmemory"):
                commit(store, 2, size=3 * CHUNK_BYTES, expect=1)
            assert store.heads(JOB, [0])[0].manifests == (manifest,)
            assert read(store, manifest, CHUNK_BYTES)["param"] == data(CHUNK_BYTES, 1)
    finally:
        private.stop()


# --- many shards in one stream


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
    with closing(redis.Redis.from_url(server.tcp_url, password="sesame")) as watcher:
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
    store: RedisStore, raw: redis.Redis, refuse: Callable[[redis.Redis], Callable[[], object]], why: str
) -> None:
    store.seal(JOB, range(20), 1, LAYOUT)
    undo: Callable[[], object] = int
    done = []
    try:
        with pytest.raises(DependencyUnfit, match=why):
            for shard, _ in store.commit_each(JOB, 1, 1, [state_of(s, 1) for s in range(20)], keep=KEEP):
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


# --- checkpoints


def test_what_is_pinned_outlives_the_versions_that_training_keeps(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    first = commit(store, 1)
    store.pin(JOB, [0], 1, "first", term=1)
    for version in range(2, 7):
        commit(store, version, expect=version - 1)
    (head,) = store.heads(JOB, [0])
    assert [each.version for each in head.manifests] == [4, 5, 6] and head.pins == {"first": first}
    assert read(store, first)["param"] == data(100, 1)
    assert_no_garbage(store, raw)
    store.unpin(JOB, [0], ["first"])
    store.unpin(JOB, [0], ["first"])
    assert not store.heads(JOB, [0])[0].pins
    assert not any(raw.exists(key) for key in first.chunk_keys(JOB, 0))
    assert_no_garbage(store, raw)


def test_two_pins_of_one_version_and_the_version_itself(store: RedisStore, raw: redis.Redis) -> None:
    """Chunks go with the last of the names that they have."""
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 1)
    store.pin(JOB, [0], 1, "a")
    store.pin(JOB, [0], 1, "b")
    store.unpin(JOB, [0], ["a"])
    store.trim(JOB, [0], 1, 0)
    assert store.heads(JOB, [0])[0].manifests == () and read(store, manifest)
    store.unpin(JOB, [0], ["b"])
    assert not any(raw.exists(key) for key in manifest.chunk_keys(JOB, 0))


def test_a_pin_may_be_moved_to_another_version(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    first = commit(store, 1)
    store.pin(JOB, [0], 1, "name")
    second = commit(store, 2, expect=1)
    store.trim(JOB, [0], 1, 2)
    store.mark_corrupt(JOB, 0, 1, 1)
    assert read(store, first), "only the pin names it now"
    store.pin(JOB, [0], 2, "name")
    assert store.heads(JOB, [0])[0].pins == {"name": second}
    assert all(raw.ttl(key) >= 0 or not raw.exists(key) for key in first.chunk_keys(JOB, 0))


def test_nothing_is_pinned_under_a_term_that_is_over(store: RedisStore) -> None:
    store.seal(JOB, [0, 1], 1, LAYOUT)
    for shard in (0, 1):
        commit(store, 1, shard=shard)
    store.seal(JOB, [1], 2, LAYOUT)
    with pytest.raises(Fenced):
        store.pin(JOB, [0, 1], 1, "late", term=1)
    assert not store.heads(JOB, [1])[0].pins
    with pytest.raises(Rewound, match=r"v:0*9"):
        store.pin(JOB, [0], 9, "nothing")


def test_a_commit_sees_a_pin_that_was_made_meanwhile(store: RedisStore, raw: redis.Redis) -> None:
    """The flip was decided on a head without the pin: it is refused, and decided again, and the chunks stay."""
    store.seal(JOB, [0], 1, LAYOUT)
    manifests = [commit(store, version, expect=version - 1 if version > 1 else None) for version in (1, 2, 3)]
    outcomes = store.commit_each(JOB, 1, 4, [state_of(0, 4, expect=3)], keep=KEEP)
    heads, reads = store.heads, itertools.count()

    def heads_once(job: str, shards: Any) -> Any:
        found = heads(job, shards)
        if next(reads) == 0:
            store.heads = heads  # type: ignore[method-assign]
            store.pin(JOB, [0], 1, "kept")
        return found

    store.heads = heads_once  # type: ignore[method-assign]
    assert isinstance(next(outcomes)[1], Manifest)
    outcomes.close()
    (head,) = store.heads(JOB, [0])
    assert [each.version for each in head.manifests] == [2, 3, 4] and head.pins == {"kept": manifests[0]}
    assert all(raw.ttl(key) == -1 for key in manifests[0].chunk_keys(JOB, 0))


def test_back_to_a_pin_and_on(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    second = commit(store, 2)
    store.pin(JOB, [0], 2, "two")
    for version in range(3, 8):
        commit(store, version, expect=version - 1 if version > 3 else 2)
    store.seal(JOB, [0], 2, LAYOUT)
    with pytest.raises(Fenced):
        store.unwind(JOB, [0], 1, 2, "two")
    assert [each.version for each in store.heads(JOB, [0])[0].manifests] == [5, 6, 7]
    store.unwind(JOB, [0], 2, 2, "two")
    store.unwind(JOB, [0], 2, 2, "two")
    (head,) = store.heads(JOB, [0])
    assert head.manifests == (second,) and read(store, second)["param"] == data(100, 2)
    # The same version again, with other bytes: the pin keeps the former.
    store.unwind(JOB, [0], 2, 1, None)
    again = commit(store, 2, term=2)
    assert again.nonce != second.nonce and read(store, second) and store.heads(JOB, [0])[0].pins == {"two": second}
    assert_no_garbage(store, raw)


def test_what_a_fork_shares_is_not_the_forks_to_remove(store: RedisStore) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 1)
    shared = replace(manifest, home=JOB)
    store.seal("fork", [0], 5, LAYOUT)
    store.adopt("fork", 0, shared, 5)
    store.adopt("fork", 0, shared, 5)
    place = bytearray(100)
    store.load("fork", 0, store.heads("fork", [0])[0].manifests[0], {"param": memoryview(place)})
    assert place == data(100, 1)
    store.trim("fork", [0], 5, 0)
    assert read(store, manifest), "the fork has removed what is another job's"


def test_extra_versions_do_not_push_out_what_all_shards_have(store: RedisStore) -> None:
    store.seal(JOB, [0], 1, LAYOUT)

    def commit_extra(version: int) -> None:
        ((_, outcome),) = store.commit_each(JOB, 1, version, [replace(state_of(0, version), extra=True)], keep=KEEP)
        assert isinstance(outcome, Manifest)

    def versions() -> list[int]:
        return [each.version for each in store.heads(JOB, [0])[0].manifests]

    commit(store, 10)
    for version in (11, 12, 13, 14):
        commit_extra(version)
    assert versions() == [10, 12, 13, 14]
    for version in (20, 30, 40):
        commit(store, version)
    assert versions() == [20, 30, 40], "extra ones are older than all others, and stay for nothing"


def test_where_a_job_went_back_to_stays_until_there_are_others(store: RedisStore) -> None:
    """It was committed for a checkpoint only, but all shards have it now, and one commits before another."""
    store.seal(JOB, [0], 1, LAYOUT)
    ((_, outcome),) = store.commit_each(JOB, 1, 7, [replace(state_of(0, 7), extra=True)], keep=KEEP)
    assert isinstance(outcome, Manifest)
    store.pin(JOB, [0], 7, "seven")
    commit(store, 8, expect=7)
    store.unwind(JOB, [0], 1, 7, "seven")
    for version in (10, 20):
        commit(store, version)
        assert 7 in [each.version for each in store.heads(JOB, [0])[0].manifests]
    for version in (21, 22, 23, 24):
        ((_, outcome),) = store.commit_each(JOB, 1, version, [replace(state_of(0, version), extra=True)], keep=KEEP)
    assert [each.version for each in store.heads(JOB, [0])[0].manifests] == [7, 10, 20, 22, 23, 24]
