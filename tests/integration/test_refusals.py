"""Bad input and broken surroundings: one clear error, the documented exit code, and nothing changed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis

import psa_store as psa
from psa_store.job.layout import layout_from_json
from psa_store.launch import PrivateRedis
from tests.harness import PSA, Run, Site

STEPS = 40


@pytest.fixture(scope="module")
def finished(site: Site) -> tuple[str, str]:
    """A finished job and its digest."""
    run = site.run("refusals", "--steps", str(STEPS), workers=1, ranks=2, commit_every=10)
    assert run.finish() == 0, run.output
    return "refusals", site.digest("refusals", STEPS)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (["--width", "32"], {}, ["another model", "shape (32, 12)", "(64, 12) in the job"]),
        (["--lr", "0.5"], {}, ["exists with lr=", "0.5", "psa job set refusals lr=", "another job name"]),
        ([], {"ranks": 3}, ["ranks=2", "ranks=3"]),
        ([], {"commit_every": 7}, ["commit_every=10", "commit_every=7"]),
    ],
    ids=["layout", "optimizer", "world size", "commit interval"],
)
def test_a_job_keeps_what_it_was_created_with(
    site: Site, finished: tuple[str, str], arguments: list[str], options: dict[str, int], words: list[str]
) -> None:
    job, digest = finished
    run = site.run(job, "--steps", str(STEPS), *arguments, workers=1, **options)
    assert run.finish() == 2, run.output
    assert all(word in run.output for word in words), run.output
    assert "Traceback" not in run.output
    assert site.digest(job, STEPS) == digest


def test_an_unknown_job_is_named_with_those_that_exist(site: Site, finished: tuple[str, str]) -> None:
    with pytest.raises(psa.errors.UnknownJob, match=f"'nothing'.*{finished[0]}"):
        psa.Store("nothing", site.redis)
    run = site.psa("status", "nothing")
    assert run.finish() == 2 and "nothing" in run.output and "Traceback" not in run.output


def test_a_nan_gradient_is_refused_by_name_and_harms_nothing(site: Site, finished: tuple[str, str]) -> None:
    job = "poisoned"
    run = site.run(job, "--steps", str(STEPS), "--poison-at", "15", workers=2, servers=2, ranks=2, commit_every=10)
    assert run.finish() == 1, run.output
    assert "rank 1 computed NaN or Inf at step 15 in the gradient of " in run.output, run.output
    cured = site.run(job, "--steps", str(STEPS), workers=2, servers=2, ranks=2, commit_every=10)
    assert cured.finish() == 0, cured.output
    assert site.digest(job, STEPS) == finished[1]


def test_nan_steps_are_skipped_for_all_alike_if_the_job_says_so(site: Site) -> None:
    digests = set()
    for job, workers, servers in (("skip-1", 1, 1), ("skip-2", 2, 2)):
        run = site.run(
            job,
            "--steps",
            str(STEPS),
            "--poison-at",
            "15",
            workers=workers,
            servers=servers,
            ranks=2,
            commit_every=10,
            skip_nonfinite=True,
        )
        assert run.finish() == 0, run.output
        assert "skipping a step with NaN or Inf" in run.output
        digests.add(site.digest(job, STEPS))
    assert len(digests) == 1


def test_two_runs_of_one_job_at_once(site: Site) -> None:
    first = site.run("twice", "--steps", "100000", "--pace-s", "0.01", workers=1)
    try:
        first.wait_for_step(3)
        second = site.run("twice", "--steps", "100000", workers=1)
        assert second.finish() == 2, second.output
        assert "is running already" in second.output
        first.wait_for_step(6)
    finally:
        first.kill()


@pytest.mark.parametrize(("which", "address"), [("PSA_REDIS", "redis://127.0.0.1:1"), ("PSA_ZOOKEEPER", "127.0.0.1:1")])
def test_an_unreachable_dependency_is_named_within_5_s(site: Site, which: str, address: str) -> None:
    started_s = time.monotonic()
    run = site.run("unreachable", workers=1, env={which: address})
    assert run.finish() == 3, run.output
    assert "127.0.0.1:1" in run.output and "Traceback" not in run.output
    assert time.monotonic() - started_s < 5.0 + 7.0, "5 s, and what the command needs to start on a busy machine"


def test_a_command_that_the_acl_refuses_ends_the_run_before_a_process_is_started(site: Site) -> None:
    with redis.Redis.from_url(site.redis) as raw:
        raw.execute_command("ACL", "SETUSER", "trainer", "reset", "on", ">secret", "~psa:*", "+@all", "-hdel")
        try:
            run = site.run("narrow", workers=1, env={"PSA_REDIS": re.sub("//.*@|//", "//trainer:secret@", site.redis)})
            assert run.finish() == 3, run.output
        finally:
            raw.execute_command("ACL", "DELUSER", "trainer")
    assert "'hdel'" in run.output and "its ACL does not allow this" in run.output, run.output
    assert len(run.lines) == 1 and run.lines[0].startswith("psa: "), run.output


class TestOwnRedis:
    @pytest.fixture
    def own(self, site: Site, tmp_path: Path) -> Iterator[Site]:
        server = PrivateRedis(tmp_path / "redis", {"maxmemory": "200mb", "maxmemory-policy": "allkeys-lru"})
        server.start(120)
        yield Site(server.url, site.zookeeper, tmp_path)
        server.stop()

    def test_a_redis_that_evicts_is_refused(self, own: Site) -> None:
        run = own.run("evicting", workers=1)
        assert run.finish() == 3, run.output
        assert "allkeys-lru" in run.output and "noeviction" in run.output


class TestDamage:
    def damage(self, site: Site, job: str, shard: int, versions: list[int]) -> None:
        """Flip one byte in the parameters of some versions of a shard, unnoticed by the job."""
        with closing(site.store()) as store, redis.Redis.from_url(site.redis) as raw:
            (head,) = store.heads(job, [shard])
            for manifest in head.manifests:
                if manifest.version in versions:
                    key = manifest.chunk_keys(job, shard)[0]
                    byte = raw.getrange(key, 0, 0)
                    raw.setrange(key, 0, bytes([byte[0] ^ 1]))

    def run(self, site: Site, job: str, steps: int) -> Run:
        # The schedule is a part of the optimizer, so the job is stopped by SIGKILL and not by fewer steps.
        return site.run(job, "--steps", str(STEPS), workers=1, ranks=2, commit_every=10)

    def test_a_damaged_version_is_replaced_by_the_newest_whole_one(self, site: Site, finished: tuple[str, str]) -> None:
        job = "damaged"
        run = self.run(site, job, STEPS)
        run.wait_for_step(35)
        run.kill()
        versions = psa.Store(job, site.redis).versions()
        assert len(versions) >= 2
        self.damage(site, job, 1, versions[-1:])
        with pytest.raises(psa.errors.DataIntegrity, match="shard 1"):
            psa.Store(job, site.redis).state_dict()
        again = self.run(site, job, STEPS)
        assert again.finish() == 0, again.output
        assert "damaged" in again.output and f"resume={versions[-2]}" in again.output
        assert site.digest(job, STEPS) == finished[1]

    def test_damage_without_a_way_out_is_refused_and_names_the_shard(self, site: Site) -> None:
        job = "ruined"
        run = self.run(site, job, STEPS)
        run.wait_for_step(35)
        run.kill()
        with closing(site.store()) as store:
            found = store.read_job(job)
            assert found is not None and len(layout_from_json(found[1]).shards) > 1
        self.damage(site, job, 1, psa.Store(job, site.redis).versions())
        again = self.run(site, job, STEPS)
        assert again.finish() == 4, again.output
        assert "shard 1" in again.output and "Traceback" not in again.output


def test_usage_errors_have_their_code(site: Site) -> None:
    for arguments in (["run", "no-such-script.py"], ["run", "--workers", "0", __file__], ["frobnicate"]):
        run = site.psa(*arguments)
        assert run.finish() == 2, run.output
    assert PSA
