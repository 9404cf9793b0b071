"""The documents of jobs, and a Redis that is away, full, unfit or begun anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import redis

from psa_store.errors import (
    DependencyUnfit,
    DependencyUnreachable,
    JobMismatch,
    UsageError,
)
from psa_store.launch import PrivateRedis
from psa_store.storage import CHUNK_BYTES, RedisStore
from tests.integration.storage.shards import JOB, LAYOUT, become_a_replica, commit, data, read, refuse_without_replicas


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


@pytest.mark.parametrize(("refuse", "why"), [(refuse_without_replicas, "NOREPLICAS"), (become_a_replica, "replica")])
def test_a_redis_that_refuses_writes_is_unfit_at_every_door(
    store: RedisStore,
    hasty: RedisStore,
    raw: redis.Redis,
    refuse: Callable[[redis.Redis], Callable[[], object]],
    why: str,
) -> None:
    store.seal(JOB, [0], 1, LAYOUT)
    undo = refuse(raw)
    try:
        for write in (lambda: commit(hasty, 1), lambda: hasty.seal(JOB, [0], 2, LAYOUT)):
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


@pytest.mark.parametrize("missing", [["FUNCTION"], ["FUNCTION", "SCRIPT"]])
def test_a_redis_without_functions_is_used_by_scripts_and_without_both_is_unfit(
    tmp_path: Path, missing: list[str]
) -> None:
    private = PrivateRedis(tmp_path, {"rename-command": "\nrename-command ".join(f'{name} ""' for name in missing)})
    private.start(120)
    try:
        with closing(RedisStore(private.url, timeout_s=5.0)) as store:
            if "SCRIPT" in missing:
                with pytest.raises(DependencyUnfit, match="neither functions nor scripts"):
                    store.check()
            else:
                store.check()
                store.seal(JOB, [0], 1, LAYOUT)
                assert commit(store, 1).version == 1
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
