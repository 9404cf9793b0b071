"""Kill everything, one role at a time and all at once: the result has the same bits as if nothing had happened.

Each test kills at steps drawn from a printed seed (set PSA_TEST_SEED to repeat one), asserts that the kill happened,
and compares the sha256 of all parameters and the whole optimizer state with that of an undisturbed run.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from psa_store.launch import PrivateRedis, PrivateZooKeeper
from tests.harness import Run, Site

STEPS = 120
COMMIT_EVERY = 10


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> str:
    """Digest of the undisturbed run: two workers, two servers, shared memory."""
    run = start(site, "undisturbed")
    assert run.finish() == 0, run.output
    return site.digest("undisturbed", STEPS)


def start(site: Site, job: str, *, carrier: str = "auto", **options: object) -> Run:
    defaults: dict[str, object] = {"workers": 2, "servers": 2, "ranks": 2, "commit_every": COMMIT_EVERY}
    return site.run(job, "--steps", str(STEPS), env={"PSA_CARRIER": carrier}, held=True, **{**defaults, **options})


def kill(pids: list[int]) -> None:
    assert pids, "there was no process to kill"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def controller(site: Site, job: str) -> list[int]:
    described = site.describe(job)
    return [server.pid for server in described.servers if server.id == described.controller]


VICTIMS: dict[str, Callable[[Site, str, random.Random], list[int]]] = {
    "a worker": lambda site, job, rng: [rng.choice(site.pids(job, "workers"))],
    "a server": lambda site, job, rng: [rng.choice(site.pids(job, "servers"))],
    "the controller": lambda site, job, rng: controller(site, job),
    "all workers": lambda site, job, rng: site.pids(job, "workers"),
    "all servers": lambda site, job, rng: site.pids(job, "servers"),
    "a worker and a server": lambda site, job, rng: [site.pids(job, "workers")[0], site.pids(job, "servers")[0]],
}


@pytest.mark.parametrize(
    ("carrier", "victims"),
    [
        *[("auto", victims) for victims in VICTIMS],
        ("tcp", "all servers"),
        ("tcp", "a worker and a server"),
        *[
            pytest.param("tcp", victims, marks=pytest.mark.long)
            for victims in ("a worker", "a server", "the controller", "all workers")
        ],
    ],
)
def test_killing_processes_changes_no_bit(
    site: Site, undisturbed: str, rng: random.Random, victims: str, carrier: str
) -> None:
    job = f"kill-{carrier}-" + victims.replace(" ", "-")
    run = start(site, job, carrier=carrier)
    for step in sorted(rng.sample(range(5, STEPS - 15), 2)):
        run.wait_for_step(step)
        pids = VICTIMS[victims](site, job, rng)
        kill(pids)
        print(f"step {step}: killed {pids}")
        # A restart is announced by the supervisor: proof that the kill was noticed, and it ends the disturbance.
        run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    assert site.digest(job, STEPS) == undisturbed


@pytest.mark.parametrize("compress", ["int8", "fp16", "topk:0.1"])
def test_compressed_gradients_have_the_same_bytes_whichever_worker_computes_them(
    site: Site, undisturbed: str, rng: random.Random, compress: str
) -> None:
    """Rounding at random draws its numbers from the rank's own stream, and what a rank holds back moves with it."""
    form = compress.partition(":")[0]
    calm = start(site, f"calm-{form}", compress=compress, workers=1, servers=1, carrier="tcp")
    assert calm.finish() == 0, calm.output
    job = f"kill-{form}"
    run = start(site, job, compress=compress)
    for step in sorted(rng.sample(range(5, STEPS - 15), 2)):
        run.wait_for_step(step)
        kill([rng.choice(site.pids(job, "workers")), rng.choice(site.pids(job, "servers"))])
        run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    assert site.digest(job, STEPS) == site.digest(f"calm-{form}", STEPS) != undisturbed


def test_one_worker_gives_the_bits_of_two(site: Site, undisturbed: str) -> None:
    run = start(site, "one-worker", workers=1, servers=1)
    assert run.finish() == 0, run.output
    assert site.digest("one-worker", STEPS) == undisturbed


def test_worker_processes_of_a_data_loader_change_no_bit(site: Site, undisturbed: str) -> None:
    run = site.run(
        "loader", "--steps", str(STEPS), "--processes", "1", workers=2, servers=1, ranks=2, commit_every=COMMIT_EVERY
    )
    assert run.finish() == 0, run.output
    assert site.digest("loader", STEPS) == undisturbed


def test_everything_is_killed_and_the_same_command_resumes(site: Site, undisturbed: str, rng: random.Random) -> None:
    for step in sorted(rng.sample(range(15, STEPS - 10), 2)):
        run = start(site, "everything")
        run.wait_for_step(step)
        run.kill()
        print(f"step {step}: killed everything")
    run = start(site, "everything")
    assert run.finish() == 0, run.output
    first = next(line for line in run.lines if line.startswith("step "))
    assert int(first.split()[1]) > COMMIT_EVERY, "the job started over instead of resuming"
    assert site.digest("everything", STEPS) == undisturbed


class TestDependencies:
    """These kill Redis or ZooKeeper, so they have their own."""

    @pytest.fixture
    def redis(self, tmp_path: Path) -> Iterator[PrivateRedis]:
        server = PrivateRedis(tmp_path / "redis")
        server.start(120)
        yield server
        server.stop()

    @pytest.fixture
    def zookeeper(self, tmp_path: Path) -> Iterator[PrivateZooKeeper]:
        server = PrivateZooKeeper(tmp_path / "zookeeper")
        server.start(120)
        yield server
        server.stop()

    @pytest.fixture
    def own(self, redis: PrivateRedis, zookeeper: PrivateZooKeeper, tmp_path: Path) -> Site:
        return Site(redis.url, zookeeper.hosts, tmp_path)

    def test_redis_is_killed_and_comes_back(
        self, own: Site, redis: PrivateRedis, undisturbed: str, rng: random.Random
    ) -> None:
        run = start(own, "redis")
        for step in sorted(rng.sample(range(5, STEPS - 15), 2)):
            run.wait_for_step(step)
            pid = redis.pid
            redis.kill()
            redis.start(120)
            assert redis.pid != pid
            print(f"step {step}: killed Redis {pid}")
        assert run.finish() == 0, run.output
        assert own.digest("redis", STEPS) == undisturbed

    def test_zookeeper_is_killed_and_comes_back(
        self, own: Site, zookeeper: PrivateZooKeeper, undisturbed: str, rng: random.Random
    ) -> None:
        run = start(own, "zookeeper")
        step = rng.randrange(5, STEPS - 15)
        run.wait_for_step(step)
        pids = list(zookeeper.pids)
        zookeeper.kill()
        zookeeper.start(120)
        assert list(zookeeper.pids) != pids
        print(f"step {step}: killed ZooKeeper {pids}")
        assert run.finish() == 0, run.output
        assert own.digest("zookeeper", STEPS) == undisturbed

    def test_zookeeper_stays_away_longer_than_a_session(
        self, own: Site, zookeeper: PrivateZooKeeper, undisturbed: str, rng: random.Random
    ) -> None:
        run = start(own, "long-outage")
        step = rng.randrange(5, STEPS // 2)
        run.wait_for_step(step)
        os.kill(zookeeper.pids[0], signal.SIGSTOP)
        try:
            print(f"step {step}: ZooKeeper sleeps until the servers stop serving")
            run.wait_for_line(lambda line: "not serving" in line)
        finally:
            os.kill(zookeeper.pids[0], signal.SIGCONT)
        assert run.finish() == 0, run.output
        assert own.digest("long-outage", STEPS) == undisturbed

    def test_what_is_told_to_leave_ends_even_if_redis_and_zookeeper_are_gone(
        self, own: Site, redis: PrivateRedis, zookeeper: PrivateZooKeeper
    ) -> None:
        run = own.run("abandoned", "--steps", "100000", workers=1, servers=1, env={"PSA_LEAVE_TIMEOUT_S": "2"})
        run.wait_for_step(5)
        redis.kill()
        zookeeper.kill()
        run.process.send_signal(signal.SIGTERM)
        assert run.finish() == 3, run.output
        assert "leaving without a hand-over" in run.output

    def test_the_whole_machine_reboots(
        self,
        own: Site,
        redis: PrivateRedis,
        zookeeper: PrivateZooKeeper,
        undisturbed: str,
        rng: random.Random,
    ) -> None:
        run = start(own, "reboot")
        step = rng.randrange(15, STEPS - 15)
        run.wait_for_step(step)
        run.kill()
        redis.kill()
        zookeeper.kill()
        print(f"step {step}: killed everything, Redis and ZooKeeper too")
        redis.start(120)
        zookeeper.start(120)
        run = start(own, "reboot")
        assert run.finish() == 0, run.output
        assert own.digest("reboot", STEPS) == undisturbed
