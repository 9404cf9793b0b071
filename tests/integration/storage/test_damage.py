"""What another program writes into the head of a shard stands in the way of nothing."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import pytest
import redis

from psa_store.errors import DataIntegrity, DependencyUnreachable, Fenced, Rewound
from psa_store.storage import Manifest, RedisStore
from psa_store.storage.head import TERMS_AHEAD_MAX, newest_term, term_text
from tests.integration.storage.shards import JOB, LAYOUT, assert_no_garbage, commit, read

HEAD = "psa:{job:0}:head"


def field(version: int) -> str:
    return f"v:{version:020}"


def not_manifests(manifest: Manifest) -> list[bytes]:
    """What may stand where a manifest stood."""
    fields = json.loads(manifest.to_json())
    broken = [
        fields | {"format": 99},
        fields | {"version": manifest.version + 1},
        fields | {"nonce": 5},
        {**fields, "sections": [fields["sections"][0] | {"size_bytes": 1 << 60}]},
        {**fields, "sections": [fields["sections"][0] | {"digests": []}]},
    ]
    return [b"", b"{", b"5", b"[1]", b"\xff\x00", b"[" * 50_000, *(json.dumps(each).encode() for each in broken)]


def test_damaged_versions_are_passed_over_and_taken_out_by_the_next_commit(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    commit(store, 1)
    for number, text in enumerate(not_manifests(commit(store, 2, expect=1))):
        version = 2 + number
        raw.hset(HEAD, field(version), text)
        (head,) = store.heads(JOB, [0])
        assert field(version).encode() in head.damaged and version not in [each.version for each in head.manifests]
        manifest = commit(store, version + 1, expect=version)
        (head,) = store.heads(JOB, [0])
        assert not head.damaged and head.manifests[-1] == manifest
        assert read(store, manifest)["param"] == bytes([version + 1]) * 100
    assert store.account.count == number + 1


def test_fields_of_others_stay_and_stop_neither_commits_nor_pins(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    raw.hset(HEAD, mapping={b"garbage": b"{", b"\xff": b"1", b"c:lost": b"{", b"c:\xfe": b"{"})
    for version in (1, 2, 3, 4):
        commit(store, version, expect=version - 1 or None)
    store.pin(JOB, [0], 4, "good", term=1)
    store.trim(JOB, [0], 1, 3)
    (head,) = store.heads(JOB, [0])
    assert [each.version for each in head.manifests] == [2, 3] and list(head.pins) == ["good"]
    assert head.damaged.keys() == {b"garbage", b"\xff", b"c:lost", b"c:\xfe"}
    assert_no_garbage(store, raw)
    store.unpin(JOB, [0], ["good", "lost"])
    assert store.heads(JOB, [0])[0].damaged.keys() == {b"garbage", b"\xff", b"c:\xfe"}


def test_a_new_field_in_place_of_a_damaged_one_is_noticed(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 1)
    raw.hset(HEAD, "garbage", "{")
    (seen,) = store.heads(JOB, [0])
    raw.hdel(HEAD, "garbage")
    raw.hset(HEAD, "c:made-meanwhile", manifest.to_json())
    pins = replace(store._pins(JOB), heads=lambda _: [seen])
    with pytest.raises(DependencyUnreachable, match="could not be changed"):
        pins.drop([0], lambda _: [manifest.field], 1)
    assert store.heads(JOB, [0])[0].names(manifest)


@pytest.mark.parametrize("term", [b"", b"{", b"zzzzzzzzzzzzzzzz", b"1", b"0" * 17, "½".encode() * 8])
def test_what_is_no_term_owns_nothing(store: RedisStore, raw: redis.Redis, term: bytes) -> None:
    store.seal(JOB, [0], 7, LAYOUT)
    commit(store, 1, term=7)
    raw.hset(HEAD, mapping={"term": term, "layout": b"{"})
    (head,) = store.heads(JOB, [0])
    assert head.term == 0 and not head.layout and head.damaged.keys() == {b"term", b"layout"}
    with pytest.raises(Rewound):
        commit(store, 2, term=7, expect=1)
    (head,) = store.seal(JOB, [0], 7, LAYOUT)
    assert (head.term, head.layout, head.damaged) == (7, LAYOUT, {})
    commit(store, 2, term=7, expect=1)


def test_a_term_that_can_not_be_is_written_over(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0, 1], 7, LAYOUT)
    raw.hset(HEAD, "term", "f" * 16)
    with pytest.raises(Fenced):
        commit(store, 1, term=7)
    assert newest_term(store.heads(JOB, [0, 1]), 7) == 7
    store.seal(JOB, [0, 1], 8, LAYOUT)
    raw.hset(HEAD, "term", term_text(8 + TERMS_AHEAD_MAX - 1))
    with pytest.raises(Fenced):
        store.seal(JOB, [0, 1], 8, LAYOUT)


def test_no_memory_is_taken_for_a_value_that_is_too_long(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    manifest = commit(store, 1)
    raw.setrange(manifest.chunk_keys(JOB, 0)[0], 64 << 20, b"x")
    tracemalloc.start()
    try:
        with pytest.raises(DataIntegrity, match=r"67108865 bytes stored"):
            read(store, manifest)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert store.heads(JOB, [0])[0].manifests == (manifest,)  # and the connection goes on with the next answer


def test_keys_of_another_type_are_removed_and_named(store: RedisStore, raw: redis.Redis) -> None:
    store.seal(JOB, [0, 1], 1, LAYOUT)
    manifest = commit(store, 1, shard=1)
    raw.delete(HEAD)
    raw.rpush(HEAD, "x")
    raw.set("psa:{job}:events", "x")
    raw.hset("psa:{job}:config", "x", "y")
    assert store.remove_foreign(JOB, [0, 1])
    assert not raw.exists(HEAD, "psa:{job}:events", "psa:{job}:config")
    assert store.heads(JOB, [1])[0].manifests == (manifest,)
    assert {each.where for each in store.account.news()} == {HEAD, "psa:{job}:events", "psa:{job}:config"}
    assert not store.remove_foreign(JOB, [0, 1])
