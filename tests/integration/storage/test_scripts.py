"""Where functions are missing, or an ACL refuses them, the same library is called as a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest
import redis

from psa_store.errors import DependencyUnfit, Fenced, Rewound
from psa_store.launch import PrivateRedis
from psa_store.storage import History, Manifest, RedisStore, examine_redis
from tests.harness import Site
from tests.integration.storage.shards import (
    JOB,
    KEEP,
    LAYOUT,
    assert_committed_once,
    assert_no_garbage,
    commit,
    read,
    state_of,
)

STEPS = 40
WITHOUT_FUNCTIONS = ["-function", "-fcall", "-fcall_ro"]


@pytest.fixture
def user(server: PrivateRedis, raw: redis.Redis) -> Iterator[Callable[..., str]]:
    """Make a user that may do all but this; returns the URL by which it comes in."""

    def make(*refused: str) -> str:
        raw.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">closed", "~psa:*", "+@all", *refused)
        return f"redis://limited:closed@127.0.0.1:{server.address[1]}"

    raw.script_flush()
    yield make
    raw.execute_command("ACL", "DELUSER", "limited")


@pytest.fixture
def by_script(user: Callable[..., str]) -> Iterator[RedisStore]:
    with closing(RedisStore(user(*WITHOUT_FUNCTIONS), timeout_s=5.0)) as store:
        store.check()
        yield store


def test_a_job_is_created_committed_pinned_and_read(by_script: RedisStore, raw: redis.Redis) -> None:
    by_script.create_job(JOB, "{}", "[]")
    by_script.seal(JOB, [0], 1, LAYOUT)
    manifests = [commit(by_script, version, expect=version - 1 or None) for version in range(1, KEEP + 3)]
    by_script.pin(JOB, [0], manifests[-1].version, "kept")
    assert read(by_script, manifests[-1])["param"] == bytearray([KEEP + 2]) * 100
    (head,) = by_script.heads(JOB, [0])
    assert head.manifests == tuple(manifests[-KEEP:]) and set(head.pins) == {"kept"}
    by_script.unpin(JOB, [0], ["kept"])
    by_script.trim(JOB, [0], 1, manifests[-2].version)
    assert by_script.replace_config(JOB, "{}", '{"a": 1}', (0, 1)) and by_script.read_job(JOB) == ('{"a": 1}', "[]")
    assert_no_garbage(by_script, raw)


def test_it_fences_and_sees_a_rewind(by_script: RedisStore, raw: redis.Redis) -> None:
    by_script.seal(JOB, [0], 2, LAYOUT)
    with pytest.raises(Fenced, match="term 2 owns"):
        commit(by_script, 1, term=1)
    commit(by_script, 1, term=2)
    with pytest.raises(Rewound):
        commit(by_script, 9, term=2, expect=8)
    with pytest.raises(Fenced):
        by_script.seal(JOB, [0], 1, LAYOUT)


def test_scripts_that_redis_forgets_in_the_middle_of_a_commit_are_sent_again(
    by_script: RedisStore, raw: redis.Redis
) -> None:
    by_script.seal(JOB, range(3), 1, LAYOUT)
    outcomes: dict[int, Manifest | Fenced | Rewound] = {}
    for shard, outcome in by_script.commit_each(JOB, 1, 1, [state_of(s, 1) for s in range(3)], keep=KEEP):
        outcomes[shard] = outcome
        raw.script_flush()  # as a restart does
    assert_committed_once(by_script, raw, 1, 100, outcomes)


def test_history_is_written_the_same_way(user: Callable[..., str], raw: redis.Redis) -> None:
    with closing(History(JOB, user(*WITHOUT_FUNCTIONS), timeout_s=5.0)) as history:
        history.event("once")
        history.event("once")
        assert history.events() == ["once"] and history.point("p") and history.curve() == ["p"]


def test_a_redis_that_runs_full_still_answers_the_functions_that_take_no_memory(
    by_script: RedisStore, raw: redis.Redis
) -> None:
    by_script.seal(JOB, [0], 1, LAYOUT)
    by_script.create_job(JOB, "{}", "[]")
    raw.config_set("maxmemory", 1)
    try:
        assert not by_script.remove_foreign(JOB, [0]) and by_script.documents(JOB).layout_digest()
        with pytest.raises(DependencyUnfit, match="maxmemory"):
            by_script.seal(JOB, [0], 2, LAYOUT)
    finally:
        raw.config_set("maxmemory", 0)


def test_what_an_acl_refuses_is_said_by_name(user: Callable[..., str]) -> None:
    url = user(*WITHOUT_FUNCTIONS, "-script", "-evalsha")
    with closing(RedisStore(url, timeout_s=1.0)) as store, pytest.raises(DependencyUnfit, match=r"\+evalsha"):
        store.check()
    facts = examine_redis(url, 5.0)
    assert not facts.has_functions and not facts.has_scripts
    scripts = examine_redis(user(*WITHOUT_FUNCTIONS), 5.0)
    assert scripts.has_scripts and not scripts.has_functions


def test_a_command_that_an_acl_refuses_to_a_script_is_named(user: Callable[..., str]) -> None:
    with closing(RedisStore(user(*WITHOUT_FUNCTIONS, "-hdel"), timeout_s=2.0)) as store:
        store.check()
        with pytest.raises(DependencyUnfit, match=r"'hdel'.*ACL does not allow this"):
            store.rehearse()


def test_a_training_has_the_same_bits(site: Site) -> None:
    with redis.Redis.from_url(site.redis) as client:
        client.execute_command(
            "ACL", "SETUSER", "limited", "reset", "on", ">closed", "~psa:*", "+@all", *WITHOUT_FUNCTIONS
        )
        try:
            _, _, path = site.redis.rpartition("@")
            own = Site(f"unix://limited:closed@{path}", site.zookeeper, site.home, site.spawner)
            for where, job in ((site, "by-function"), (own, "by-script")):
                run = where.run(job, "--steps", str(STEPS), workers=2, servers=2, ranks=2, commit_every=5)
                assert run.finish() == 0, run.output
            assert site.digest("by-function", STEPS) == own.digest("by-script", STEPS)
            assert client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0) > 0
        finally:
            with suppress(redis.exceptions.RedisError):
                client.execute_command("ACL", "DELUSER", "limited")
