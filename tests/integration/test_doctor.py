"""`psa doctor` against real servers: sound ones, ones that are away, and ones that are unfit."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from psa_store.cli.doctor import examine
from psa_store.coordination import examine_zookeeper
from psa_store.errors import DependencyUnreachable
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.layout import TensorRole, TensorSpec, layout_from_json, make_layout
from psa_store.launch import PrivateRedis, PrivateZooKeeper
from psa_store.observe.doctor.footprint import footprint_of
from psa_store.optim import AdamW
from psa_store.storage import RedisStore, examination, measure_redis
from tests.harness import Run, Site

NOWHERE = "127.0.0.1:1"
MACHINE = ["python", "torch", "redis-py", "kazoo", "file descriptors", "loopback"]
REDIS = [
    "Redis",
    "Redis version",
    "Redis eviction",
    "Redis persistence",
    "Redis compression",
    "Redis clock",
    "Redis replicas",
    "Redis memory",
    "Redis commands",
    "Redis bandwidth",
]
ZOOKEEPER = ["ZooKeeper", "ZooKeeper version", "ZooKeeper latency", "ZooKeeper session", "ZooKeeper access"]

Checks = dict[str, dict[str, str]]


def doctor(site: Site, job: str | None = None, *, exit_code: int = 0, **settings: Any) -> Checks:
    """What it found, by name; it must give this exit code. In this process: a command takes seconds to start."""
    told, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(told), redirect_stderr(complained):
        code = examine(job, True, site.settings.model_copy(update=settings))
    assert code == exit_code, told.getvalue()
    assert complained.getvalue() == ""
    return read(told.getvalue(), exit_code)


def doctor_command(site: Site, exit_code: int, **env: str) -> Checks:
    """The same from the command line."""
    run = site.psa("doctor", "--json", env=env)
    assert run.finish() == exit_code, run.output
    return read(run.output, exit_code)


def read(output: str, exit_code: int) -> Checks:
    document = json.loads(output)
    assert document["fit"] == (exit_code == 0)
    assert all(bool(check["fix"]) == (check["verdict"] != "pass") for check in document["checks"])
    return {check["name"]: check for check in document["checks"]}


def verdicts(checks: Checks, names: list[str]) -> set[str]:
    return {checks[name]["verdict"] for name in names}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    """A Redis that may be spoiled."""
    private = PrivateRedis(tmp_path_factory.mktemp("redis"), tcp=True)
    private.start(120)
    yield private
    private.stop()


@pytest.fixture
def raw(server: PrivateRedis) -> Iterator[redis.Redis]:
    """Commands to it; afterwards it is sound and empty again."""
    with redis.Redis.from_url(server.url) as client:
        yield client
        client.flushall()
        client.function_flush()
        for name, value in {"maxmemory": 0, "maxmemory-policy": "noeviction", "appendonly": "yes", "save": ""}.items():
            client.config_set(name, value)


@pytest.fixture
def own(site: Site, server: PrivateRedis, tmp_path: Path) -> Site:
    return Site(server.url, site.zookeeper, tmp_path)


def test_sound_servers_are_fit_and_nothing_of_the_checks_stays(own: Site, raw: redis.Redis) -> None:
    checks = doctor_command(own, 0)
    assert list(checks) == [*MACHINE, *REDIS, *ZOOKEEPER]
    assert verdicts(checks, list(checks)) <= {"pass", "warn"}
    sure = ["Redis", "Redis version", "Redis eviction", "Redis persistence", "Redis memory", "ZooKeeper"]
    assert verdicts(checks, sure) == {"pass"}
    assert "1 of 1 serve (standalone)" in checks["ZooKeeper"]["found"]
    assert raw.dbsize() == 0


def test_functions_of_another_release_are_left_alone(own: Site, raw: redis.Redis) -> None:
    """A job that runs may use them."""
    other = "#!lua name=psa_store\nredis.register_function('psa_commit', function() return 1 end)\n"
    raw.function_load(other)
    check = doctor(own)["Redis commands"]
    assert check["verdict"] == "warn" and "another release" in check["found"]
    assert other.encode() in raw.function_list(withcode=True)[0]


def test_a_command_that_an_acl_refuses_is_named(own: Site, raw: redis.Redis) -> None:
    raw.execute_command("ACL", "SETUSER", "default", "-pttl")
    try:
        check = doctor(own, exit_code=3)["Redis commands"]
    finally:
        raw.execute_command("ACL", "SETUSER", "default", "+pttl")
    assert check["verdict"] == "fail" and "'pttl'" in check["found"]


def test_people_get_a_table_with_the_line_that_mends_it(own: Site, raw: redis.Redis) -> None:
    raw.config_set("maxmemory-policy", "allkeys-lru")
    run = Run(["doctor"], {**own.env, "COLUMNS": "250"})
    assert run.finish() == 3 and "Traceback" not in run.output
    (row,) = [number for number, line in enumerate(run.lines) if "Redis eviction" in line]
    assert "FAIL" in run.lines[row] and "allkeys-lru" in run.lines[row]
    assert "→ `redis-cli CONFIG SET maxmemory-policy noeviction`" in run.lines[row + 1]


def test_a_redis_that_evicts_is_unfit_until_it_is_mended(own: Site, raw: redis.Redis) -> None:
    raw.config_set("maxmemory-policy", "allkeys-lru")
    check = doctor(own, exit_code=3)["Redis eviction"]
    assert check["verdict"] == "fail" and "allkeys-lru" in check["found"]
    assert "CONFIG SET maxmemory-policy noeviction" in check["fix"]
    raw.config_set("maxmemory-policy", "noeviction")
    assert doctor(own)["Redis eviction"]["verdict"] == "pass"


def test_a_redis_that_keeps_nothing_on_disk_is_unfit(own: Site, raw: redis.Redis) -> None:
    raw.config_set("appendonly", "no")
    assert "every job" in doctor(own, exit_code=3)["Redis persistence"]["found"]
    raw.config_set("save", "3600 1")
    assert doctor(own)["Redis persistence"]["verdict"] == "warn"


def test_redis_away_hides_nothing_of_zookeeper(site: Site) -> None:
    checks = doctor_command(site, 3, PSA_REDIS=f"redis://{NOWHERE}")
    assert list(checks) == [*MACHINE, "Redis", *ZOOKEEPER]
    assert checks["Redis"]["verdict"] == "fail" and NOWHERE in checks["Redis"]["found"]
    assert checks["ZooKeeper"]["verdict"] == "pass" and "fail" not in verdicts(checks, ZOOKEEPER)


def test_zookeeper_away_hides_nothing_of_redis(site: Site) -> None:
    checks = doctor_command(site, 3, PSA_ZOOKEEPER=NOWHERE)
    assert list(checks) == [*MACHINE, *REDIS, "ZooKeeper"]
    assert checks["ZooKeeper"]["verdict"] == "fail" and NOWHERE in checks["ZooKeeper"]["found"]
    assert checks["Redis"]["verdict"] == "pass" and "fail" not in verdicts(checks, REDIS)


def test_addresses_of_something_else_are_told_as_such(own: Site, server: PrivateRedis) -> None:
    """Each is given the other's."""
    host, port = server.address
    checks = doctor(
        own, exit_code=3, redis=f"redis://{own.zookeeper}", zookeeper=f"{host}:{port}", connect_timeout_s=1.0
    )
    assert checks["Redis"]["verdict"] == "fail" and checks["ZooKeeper"]["verdict"] == "fail"


def test_addresses_that_cannot_be_read(site: Site) -> None:
    checks = doctor(site, exit_code=3, redis="nonsense", zookeeper="zk:port")
    assert "nonsense" in checks["Redis"]["found"] and "zk:port" in checks["ZooKeeper"]["found"]


@pytest.mark.parametrize("missing", ["PSA_REDIS", "PSA_ZOOKEEPER"])
def test_a_missing_address_is_bad_usage(site: Site, tmp_path: Path, missing: str) -> None:
    env = {**site.env, "PSA_HOME": str(tmp_path)}
    del env[missing]
    run = Run(["doctor"], env)
    assert run.finish() == 2 and "psa up" in run.output and "Traceback" not in run.output


class TestJob:
    @pytest.fixture
    def job(self, own: Site, raw: redis.Redis) -> str:
        """A job that takes 3 versions of 24 MB, of which nothing is stored yet."""
        layout = make_layout([TensorSpec(("weight",), (2_000_000,), "float32", TensorRole.TRAINED)])
        config = JobConfig("large", 4, 0, AdamW().to_dict(), layout.fingerprint)
        with closing(own.store()) as store:
            store.create_job("large", config.to_json(), layout.to_json())
        return "large"

    def test_its_versions_must_fit_into_redis(self, own: Site, raw: redis.Redis, job: str) -> None:
        check = doctor(own, job)["Redis memory"]
        assert "90.0 MB in 3 versions" in check["found"]
        used = int(raw.info("memory")["used_memory"])
        raw.config_set("maxmemory", used + 80 * 10**6)
        check = doctor(own, job, exit_code=3)["Redis memory"]
        assert check["verdict"] == "fail" and "MB more" in check["fix"]
        raw.config_set("maxmemory", used + 100 * 10**6)
        assert doctor(own, job)["Redis memory"]["verdict"] == "warn"
        raw.config_set("maxmemory", used + 140 * 10**6)
        assert doctor(own, job)["Redis memory"]["verdict"] in ("pass", "warn")

    def test_a_redis_with_little_room_is_not_filled_by_measuring(self, own: Site, raw: redis.Redis, job: str) -> None:
        raw.config_set("maxmemory", int(raw.info("memory")["used_memory"]) + 60 * 10**6)
        check = doctor(own, job, exit_code=3)["Redis bandwidth"]
        assert check["verdict"] == "warn" and "not measured" in check["found"]

    def test_one_that_cannot_be_read_is_told(self, own: Site, raw: redis.Redis, job: str) -> None:
        raw.set("psa:{large}:layout", "spoiled")
        checks = doctor(own, job, exit_code=3)
        assert checks["Redis memory"]["verdict"] == "fail" and "layout" in checks["Redis memory"]["found"]
        assert checks["ZooKeeper"]["verdict"] == "pass"

    def test_an_unknown_one_is_bad_usage(self, own: Site, job: str) -> None:
        run = Run(["doctor", "larger"], own.env)
        assert run.finish() == 2 and "known jobs: large" in run.output and "Traceback" not in run.output

    @pytest.mark.parametrize(
        ("mode", "compress"),
        [("sync", "none"), ("local:steps=4", "none"), ("local:steps=4", "int8"), ("async", "none")],
    )
    def test_what_is_foretold_is_what_a_job_stores(self, site: Site, mode: str, compress: str) -> None:
        job = f"stored-{mode.partition(':')[0]}-{compress}"
        run = site.run(job, "--steps", "64", workers=1, ranks=2, commit_every=2, mode=mode, compress=compress)
        assert run.finish() == 0, run.output
        with closing(site.store()) as store:
            found = store.read_job(job)
            assert found is not None
            layout = layout_from_json(found[1])
            heads = store.heads(job, [shard.index for shard in layout.shards])
        sections = [section for head in heads for manifest in head.manifests for section in manifest.sections]
        stored = sum(section.size_bytes for section in sections)
        assert stored == footprint_of(job_config_from_json(found[0]), layout).kept_bytes
        assert ", 0.0 kB of it to come" in doctor(site, job)["Redis memory"]["found"]


class TestMeasuring:
    def test_a_measurement_that_breaks_leaves_nothing(
        self, server: PrivateRedis, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[float] = []

        def broken(_pool: object, wanted: list[tuple[str, memoryview]]) -> list[str]:
            seen.extend(raw.ttl(key) for key, _ in wanted)
            raise redis.exceptions.ConnectionError("cut")

        monkeypatch.setattr(examination, "read_into", broken)
        with pytest.raises(DependencyUnreachable, match="cut"):
            measure_redis(server.url, 5.0)
        assert seen and all(0 < ttl <= 60 for ttl in seen), "if we had died, they would have gone by themselves"
        assert raw.dbsize() == 0

    def test_keys_of_a_job_of_any_name_are_left_alone(self, server: PrivateRedis, raw: redis.Redis) -> None:
        with closing(RedisStore(server.url, timeout_s=5.0)) as store:
            store.create_job("probe", "config", "layout")
            before = sorted(raw.keys())
            measure_redis(server.url, 5.0)
            assert sorted(raw.keys()) == before and store.read_job("probe") == ("config", "layout")


def test_members_of_an_ensemble_are_counted_one_by_one(tmp_path: Path) -> None:
    ensemble = PrivateZooKeeper(tmp_path, nodes=3)
    look = partial(examine_zookeeper, ensemble.hosts + "/team", session_timeout_s=4.0, connect_timeout_s=5.0)
    try:
        ensemble.start(60)
        members = look()
        assert [member.serves for member in members] == [True] * 3
        assert sorted(member.mode for member in members) == ["follower", "follower", "leader"]
        assert all(member.granted_s == 4.0 and len(member.round_trips_s) > 5 for member in members)
        follower = next(index for index, member in enumerate(members) if member.mode == "follower")
        ensemble.kill(follower)
        left = look()
        assert [index for index, member in enumerate(left) if not member.serves] == [follower]
        ensemble.kill((follower + 1) % 3)
        assert not any(member.serves for member in look())
        assert any("without a quorum" in member.problem for member in look())
    finally:
        ensemble.stop()
