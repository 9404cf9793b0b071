"""One shard: the fence, the flip, what a crash leaves, and what damage looks like."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import redis

from chaos.proxy import Proxy
from psa_store.errors import (
    DataIntegrity,
    DependencyUnreachable,
    Fenced,
    Rewound,
)
from psa_store.launch import PrivateRedis
from psa_store.storage import CHUNK_BYTES, RedisStore
from psa_store.storage import commit as storage_commit
from psa_store.storage.stream import Command
from tests.integration.storage.shards import JOB, KEEP, LAYOUT, assert_no_garbage, commit, data, read, write_chunks


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
    raw.rpush(chunk, "x")
    with pytest.raises(DataIntegrity, match="chunk 0: of another type"):
        read(store, manifest)


def test_damage_is_found_in_every_chunk_of_every_section(store: RedisStore, raw: redis.Redis) -> None:
    size = CHUNK_BYTES + 4
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 1, size=size)
    chunks = [(section, index) for section in ("param", "momentum") for index in (0, 1)]
    for (section, index), key in zip(chunks, manifest.chunk_keys(JOB, 0), strict=True):
        last = raw.strlen(key) - 1
        stored = raw.getrange(key, last, last)
        raw.setrange(key, last, bytes([stored[0] ^ 1]))
        with pytest.raises(DataIntegrity, match=f"section {section}, chunk {index}: damaged"):
            read(store, manifest, size)
        raw.setrange(key, last, stored)
    read(store, manifest, size)


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


def test_a_version_committed_again_is_not_taken_for_the_one_that_was_there(
    store: RedisStore, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its flip was decided on a head that has changed: what is found there, under the same version, is another's."""
    store.seal(JOB, [0], 1, LAYOUT)
    first = commit(store, 1)
    stale = store.heads(JOB, [0])
    store.pin(JOB, [0], 1, "meanwhile")
    heads, answers = store.heads, [stale]
    monkeypatch.setattr(store, "heads", lambda job, shards: answers.pop() if answers else heads(job, shards))
    again = commit(store, 1, expect=1)
    (head,) = store.heads(JOB, [0])
    assert (
        not answers and again.nonce != first.nonce and head.manifests == (again,) and head.pins == {"meanwhile": first}
    )
    read(store, again)
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
    with closing(redis.Redis.from_url(server.tcp_url)) as watcher:
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


def test_a_configuration_is_replaced_while_no_newer_term_has_begun(store: RedisStore) -> None:
    store.create_job(JOB, "first", "layout")
    store.seal(JOB, [0], 4, LAYOUT)
    assert store.replace_config(JOB, "first", "second", (0, 4))
    store.seal(JOB, [0], 5, LAYOUT)
    assert store.replace_config(JOB, "first", "second", (0, 4)), "an answer was lost: it is done"
    assert not store.replace_config(JOB, "second", "third", (0, 4))
    assert not store.replace_config(JOB, "first", "third"), "it is another one"
    assert store.read_job(JOB) == ("second", "layout")
    assert store.replace_config(JOB, "second", "third", (0, 5))
