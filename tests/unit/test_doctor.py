"""The judgements of `psa doctor`: facts in, a verdict and one line to mend it out."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from psa_store.coordination import ZooKeeperMember
from psa_store.job.config import JobConfig
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.job.mode import parse_mode
from psa_store.observe.doctor import Check, Verdict, machine, redis, zookeeper
from psa_store.observe.doctor.footprint import Footprint, footprint_of
from psa_store.optim import SGD, AdamW, Optimizer
from psa_store.storage import PROBE_BYTES, RedisFacts, RedisRates

PASS, WARN, FAIL = Verdict.PASS, Verdict.WARN, Verdict.FAIL
MB = 10**6
TIMEOUT_S = 4.0

REDIS = RedisFacts(
    where="redis://db:6379",
    product="Redis 7.2.4",
    version="7.2.4",
    has_functions=True,
    has_scripts=True,
    is_replica=False,
    eviction="noeviction",
    memory_limit_bytes=0,
    system_memory_bytes=10_000 * MB,
    used_memory_bytes=100 * MB,
    appends=True,
    appendfsync="everysec",
    save="",
    compresses=False,
    cannot_persist=False,
    round_trip_s=0.001,
    clock_ahead_s=0.01,
    run_id="0123",
    replicas=1,
)
LEADER = ZooKeeperMember("zk1:2181", "", "3.9.2", "leader", TIMEOUT_S, (0.001, 0.002, 0.5))
FOLLOWER = replace(LEADER, address="zk2:2181", mode="follower")
GONE = ZooKeeperMember("zk3:2181", "no connection: Connection refused")


def named(checks: list[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


class TestMachine:
    def test_the_oldest_versions_are_those_of_pyproject(self) -> None:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        demanded = dict(re.split(">=", each) for each in project["dependencies"])
        demanded["python"] = project["requires-python"].removeprefix(">=")
        assert {name: machine.numbers(demanded[name]) for name in machine.OLDEST} == machine.OLDEST

    @pytest.mark.parametrize(
        ("version", "verdict"), [("2.13.0+cpu", PASS), ("2.4", PASS), ("2.3.1", FAIL), ("1.99", FAIL), (None, WARN)]
    )
    def test_what_is_installed(self, version: str | None, verdict: Verdict) -> None:
        check = machine.judge_installed("torch", version)
        assert check.verdict is verdict
        assert check.fix == ("" if verdict is PASS else "pip install 'torch>=2.4'")

    def test_descriptors_must_do_for_all_ranks_of_the_job(self) -> None:
        assert machine.judge_descriptors(1024, 1).verdict is PASS
        check = machine.judge_descriptors(1024, 2000)
        assert check.verdict is WARN and "ulimit -n 8192" in check.fix
        in_stages = machine.judge_descriptors(1024, 500, 4)
        assert in_stages.fix == check.fix and "for 4 stages of 500 ranks" in in_stages.found

    def test_a_loopback_that_crawls_is_told(self) -> None:
        assert machine.judge_loopback(3e9).verdict is PASS
        assert machine.judge_loopback(1e8).verdict is WARN


class TestRedis:
    def test_a_sound_one_has_nothing_to_mend(self) -> None:
        assert {check.verdict for check in redis.judge_redis(REDIS, 0)} == {PASS}

    @pytest.mark.parametrize(
        ("name", "changed", "verdict", "fix"),
        [
            ("Redis", {"is_replica": True}, FAIL, "master"),
            ("Redis", {"in_cluster": True}, FAIL, "cluster"),
            ("Redis version", {"has_functions": False, "has_scripts": False}, FAIL, "Redis 7.0"),
            ("Redis version", {"has_functions": False, "version": "6.3.4"}, PASS, ""),
            ("Redis version", {"version": "6.2.14"}, FAIL, "Redis 7.0"),
            ("Redis eviction", {"eviction": "volatile-lru"}, FAIL, "maxmemory-policy noeviction"),
            ("Redis eviction", {"eviction": None}, WARN, "noeviction"),
            ("Redis persistence", {"cannot_persist": True}, FAIL, "disk"),
            ("Redis compression", {"compresses": True}, WARN, "rdbcompression no"),
            ("Redis compression", {"compresses": None}, PASS, ""),
            ("Redis persistence", {"appendfsync": "always"}, PASS, ""),
            ("Redis persistence", {"appendfsync": "no"}, WARN, "appendfsync everysec"),
            ("Redis persistence", {"appendfsync": None}, WARN, "appendfsync everysec"),
            ("Redis persistence", {"appends": False, "save": "3600 1"}, WARN, "appendonly yes"),
            ("Redis persistence", {"appends": False, "save": None}, WARN, "appendonly yes"),
            ("Redis persistence", {"appends": False}, FAIL, "appendonly yes"),
            ("Redis replicas", {"replicas": 0}, FAIL, "PSA_REPLICAS_ACKNOWLEDGE"),
            ("Redis replicas", {"replicas": 2}, PASS, ""),
            ("Redis clock", {"clock_ahead_s": 3.0}, WARN, "chrony"),
            ("Redis clock", {"clock_ahead_s": -3.0}, WARN, "chrony"),
        ],
    )
    def test_what_is_not_well_and_the_line_that_mends_it(
        self, name: str, changed: dict[str, object], verdict: Verdict, fix: str
    ) -> None:
        checks = redis.judge_redis(replace(REDIS, **changed), 1)  # type: ignore[arg-type]
        check = named(checks, name)
        assert check.verdict is verdict and fix in check.fix
        assert {each.verdict for each in checks if each is not check} == {PASS}, "one fault, one check"

    def test_a_redis_that_takes_no_snapshots_may_be_set_to_compress_them(self) -> None:
        idle = replace(REDIS, compresses=True, appends=False)
        assert named(redis.judge_redis(idle, 0), "Redis compression").verdict is PASS
        assert named(redis.judge_redis(replace(idle, save="3600 1"), 0), "Redis compression").verdict is WARN

    def test_the_room_is_what_the_narrower_limit_leaves(self) -> None:
        assert replace(REDIS, memory_limit_bytes=300 * MB).room_bytes == 200 * MB
        assert replace(REDIS, memory_limit_bytes=20_000 * MB).room_bytes == 9_900 * MB
        assert replace(REDIS, system_memory_bytes=0).room_bytes is None

    @pytest.mark.parametrize(
        ("limit_mb", "stored_mb", "verdict"),
        [
            # Three versions of 100 MB take 375 MB as Redis counts, and one more while it is written 500 MB.
            (100 + 374, 0, FAIL),
            (100 + 376, 0, WARN),
            (100 + 501, 0, PASS),
            (100 + 126, 300, PASS),
            (100 + 124, 300, WARN),
            (100 + 124, 200, FAIL),
            (0, 0, PASS),
        ],
    )
    def test_a_job_must_fit(self, limit_mb: int, stored_mb: int, verdict: Verdict) -> None:
        facts = replace(REDIS, memory_limit_bytes=limit_mb * MB)
        check = redis.judge_headroom(facts, "demo", Footprint(100 * MB, 0, 3), stored_mb * MB)
        assert check.verdict is verdict, check
        assert "375.0 MB in 3 versions" in check.found

    def test_a_log_that_is_rewritten_needs_as_much_again(self) -> None:
        small = replace(REDIS, system_memory_bytes=900 * MB)
        footprint = Footprint(100 * MB, 0, 3)
        assert redis.judge_headroom(small, "demo", footprint, 0).verdict is WARN
        assert redis.judge_headroom(replace(small, appends=False), "demo", footprint, 0).verdict is PASS

    def test_a_redis_that_is_nearly_full_is_told_without_a_job(self) -> None:
        assert redis.judge_room(REDIS).verdict is PASS
        assert redis.judge_room(replace(REDIS, memory_limit_bytes=105 * MB)).verdict is WARN

    def test_a_full_redis_is_not_measured(self) -> None:
        assert redis.may_measure(REDIS)
        full = replace(REDIS, memory_limit_bytes=REDIS.used_memory_bytes + PROBE_BYTES)
        assert not redis.may_measure(full) and redis.unmeasured(full).verdict is WARN
        assert not redis.may_measure(replace(REDIS, is_replica=True))

    def test_a_slow_one_is_told_with_what_it_costs_the_job(self) -> None:
        footprint = Footprint(100 * MB, 0, 3)
        assert redis.judge_rates(RedisRates(1e9, 2e9), footprint).verdict is PASS
        slow = redis.judge_rates(RedisRates(20e6, 2e9), footprint)
        assert slow.verdict is WARN and "5.0 s to write" in slow.found
        assert redis.judge_rates(RedisRates(1e9, 20e6), None).verdict is WARN


class TestZooKeeper:
    def test_a_sound_ensemble_has_nothing_to_mend(self) -> None:
        checks = zookeeper.judge_zookeeper([LEADER, FOLLOWER], TIMEOUT_S)
        assert [check.verdict for check in checks] == [PASS] * 4
        assert "2 of 2 serve (follower, leader)" in checks[0].found

    def test_a_member_that_is_gone_is_named(self) -> None:
        check = zookeeper.judge_zookeeper([LEADER, FOLLOWER, GONE], TIMEOUT_S)[0]
        assert check.verdict is WARN and "2 of 3" in check.found and "zk3:2181: no connection" in check.found

    def test_without_one_that_serves_there_is_nothing_else_to_say(self) -> None:
        (check,) = zookeeper.judge_zookeeper([GONE, replace(GONE, address="zk4:2181")], TIMEOUT_S)
        assert check.verdict is FAIL and "0 of 2" in check.found

    def test_members_that_do_not_know_each_other_are_no_ensemble(self) -> None:
        alone = replace(LEADER, mode="standalone")
        assert zookeeper.judge_zookeeper([alone], TIMEOUT_S)[0].verdict is PASS
        assert zookeeper.judge_zookeeper([alone, replace(alone, address="zk2:2181")], TIMEOUT_S)[0].verdict is FAIL

    @pytest.mark.parametrize(
        ("name", "changed", "verdict"),
        [
            ("ZooKeeper version", {"version": "3.8.4"}, PASS),
            ("ZooKeeper version", {"version": "3.8.0"}, WARN),
            ("ZooKeeper version", {"version": "3.10.0"}, PASS),
            ("ZooKeeper version", {"version": "3.4.14"}, FAIL),
            ("ZooKeeper version", {"version": ""}, PASS),
            ("ZooKeeper latency", {"round_trips_s": (0.2, 0.2, 0.001)}, WARN),
            ("ZooKeeper session", {"granted_s": 6.0}, WARN),
            ("ZooKeeper session", {"granted_s": 2.0}, WARN),
        ],
    )
    def test_the_worst_member_counts(self, name: str, changed: dict[str, object], verdict: Verdict) -> None:
        worse = replace(FOLLOWER, **changed)  # type: ignore[arg-type]
        assert named(zookeeper.judge_zookeeper([LEADER, worse], TIMEOUT_S), name).verdict is verdict

    def test_a_version_that_no_member_shows(self) -> None:
        checks = zookeeper.judge_zookeeper([replace(LEADER, version="")], TIMEOUT_S)
        assert named(checks, "ZooKeeper version").verdict is WARN


class TestFootprint:
    TENSORS = (
        TensorSpec(("wide",), (1024,), "float32", TensorRole.TRAINED),
        TensorSpec(("narrow",), (1024,), "bfloat16", TensorRole.TRAINED),
        TensorSpec(("seen",), (8,), "int64", TensorRole.BUFFER),
        TensorSpec(("fixed",), (1024,), "float32", TensorRole.FROZEN),
    )

    def footprint(self, optimizer: Optimizer, mode: str) -> Footprint:
        layout = make_layout(self.TENSORS)
        config = JobConfig("demo", 2, 0, optimizer.to_dict(), layout.fingerprint, 10, mode=parse_mode(mode))
        return footprint_of(config, layout)

    @pytest.mark.parametrize(
        ("optimizer", "mode", "version", "versions"),
        [
            (SGD(), "sync", 4096 + (2048 + 4096) + 64, 3),
            (AdamW(), "sync", 3 * 4096 + (2048 + 3 * 4096) + 64, 3),
            (AdamW(), "async", 3 * 4096 + (2048 + 3 * 4096) + 64, 5),
            # Servers keep a momentum; each of two ranks two slots for either parameter, and a count for either.
            (AdamW(), "local:steps=4", 2 * 4096 + (2048 + 2 * 4096) + 64 + 2 * (2 * 4096 + 2 * 4096 + 16), 3),
        ],
    )
    def test_a_version_is_parameters_slots_and_rank_state(
        self, optimizer: Optimizer, mode: str, version: int, versions: int
    ) -> None:
        footprint = self.footprint(optimizer, mode)
        assert footprint.version_bytes == version
        assert footprint.kept_bytes == versions * version + 4096, "frozen tensors are stored once"
