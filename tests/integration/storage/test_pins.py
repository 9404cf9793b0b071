"""Versions under a second name: what a checkpoint keeps, where a job goes back to, what a fork shares."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import redis

from psa_store.errors import (
    Fenced,
    Rewound,
)
from psa_store.storage import Manifest, RedisStore
from tests.integration.storage.shards import JOB, KEEP, LAYOUT, assert_no_garbage, commit, data, read, state_of


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
