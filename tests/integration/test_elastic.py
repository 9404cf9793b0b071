"""Members that come, go, sleep and wake: the bits of the result do not depend on them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from psa_store.testing.failpoints import FailpointAction, arm, hit
from tests.harness import TRAIN, Run, Site

STEPS = 150
SCRIPT = ["--steps", str(STEPS), "--pace-s", "0.01"]


def start(site: Site, job: str, *arguments: str, carrier: str = "auto", **options: object) -> Run:
    defaults: dict[str, object] = {"workers": 1, "servers": 1, "ranks": 2, "commit_every": 10}
    return site.run(job, *SCRIPT, *arguments, env={"PSA_CARRIER": carrier}, **{**defaults, **options})


def join(site: Site, *arguments: str, carrier: str = "auto") -> Run:
    """`psa worker` or `psa server`, as started on another machine."""
    return site.psa(*arguments, env={"PSA_CARRIER": carrier})


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> str:
    run = start(site, "elastic-undisturbed")
    assert run.finish() == 0, run.output
    return site.digest("elastic-undisturbed", STEPS)


@pytest.mark.parametrize("carrier", ["auto", pytest.param("tcp", marks=pytest.mark.long)])
def test_a_worker_joins_half_way_and_leaves_again(site: Site, undisturbed: str, carrier: str, tmp_path: Path) -> None:
    job, hurry = f"elastic-worker-{carrier}", tmp_path / "hurry"
    run = start(site, job, "--meet", "2", "--pace-s", "0.05", "--paced-until", str(hurry), carrier=carrier)
    run.wait_for_step(20)
    guest = join(site, "worker", str(TRAIN), "--job", job, *SCRIPT, carrier=carrier)
    run.wait_for_line(lambda line: line == "met 2")  # or its script would wait for a guest that is gone
    holders = {rank for worker in site.describe(job).workers for rank in worker.ranks}
    assert holders == {0, 1} and len(site.pids(job, "workers")) == 2
    guest.process.send_signal(signal.SIGTERM)
    hurry.touch()
    assert guest.finish() == 0, guest.output
    assert run.finish() == 0, run.output
    assert site.digest(job, STEPS) == undisturbed


def test_ctrl_c_is_the_business_of_the_supervisor_alone(site: Site, undisturbed: str) -> None:
    """A terminal sends it to the whole group; children that left by themselves would race with the supervisor."""
    job = "elastic-ctrl-c"
    run = start(site, job, workers=2, servers=2)
    site.wait_until_serving(run, job, 2)
    until_here = len(run.lines)
    for pid in [*site.pids(job, "servers"), *site.pids(job, "workers")]:
        os.kill(pid, signal.SIGINT)
    assert run.finish() == 0, run.output
    assert not [line for line in run.lines[until_here:] if "hand-over" in line], run.output
    assert site.digest(job, STEPS) == undisturbed
    assert run.output.count(f"step {STEPS} ") == 1, run.output


def test_a_server_joins_takes_shards_and_hands_them_back_without_a_lost_step(
    site: Site, undisturbed: str, tmp_path: Path
) -> None:
    hurry = tmp_path / "hurry"
    slowly = ["--pace-s", "0.3", "--paced-until", str(hurry)]
    run = start(site, "elastic-server", *slowly, commit_every=0)
    run.wait_for_step(20)
    guest = join(site, "server", "--job", "elastic-server")
    run.wait_for_line(lambda line: "hand-over at version" in line)
    shards = [server.shards for server in site.describe("elastic-server").servers]
    assert len(shards) == 2 and min(shards) > 0
    guest.process.send_signal(signal.SIGTERM)
    assert guest.finish() == 0, guest.output
    run.wait_for_line(lambda line: "hand-over at version" in line)
    hurry.touch()
    assert run.finish() == 0, run.output
    steps = [int(line.split()[1]) for line in run.lines if line.startswith("step ")]
    assert steps == sorted(set(steps)), "a step was computed twice, although no process died"
    assert site.digest("elastic-server", STEPS) == undisturbed


def test_sigterm_ends_a_run_cleanly_and_loses_no_step(site: Site, undisturbed: str) -> None:
    run = start(site, "elastic-sigterm", commit_every=0)
    run.wait_for_step(30)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output
    last = max(int(line.split()[1]) for line in run.lines if line.startswith("step "))
    assert "stopped: the same command goes on from here" in run.lines[-1] and "version=" in run.lines[-1]
    again = start(site, "elastic-sigterm", commit_every=0)
    assert again.finish() == 0, again.output
    assert "finished" in again.lines[-1] and f"version={STEPS}" in again.lines[-1]
    first = min(int(line.split()[1]) for line in again.lines if line.startswith("step "))
    assert first in (last + 1, last + 2)  # the last step may have completed after its worker printed the one before
    assert site.digest("elastic-sigterm", STEPS) == undisturbed


def test_a_server_that_slept_past_its_session_is_refused(site: Site, tmp_path: Path) -> None:
    """It is stopped in a commit, before the flip; woken, it must find its term over."""
    arguments = ["--steps", "60"]
    options = {"workers": 1, "servers": 2, "ranks": 1, "commit_every": 1}
    calm = site.run("elastic-awake", *arguments, **options)
    assert calm.finish() == 0, calm.output
    hurry = tmp_path / "hurry"
    slowly = ["--pace-s", "0.2", "--paced-until", str(hurry)]  # until the second server has joined
    run = site.run("elastic-asleep", *arguments, *slowly, env={"PSA_FAILPOINTS": str(tmp_path)}, **options)
    site.wait_until_serving(run, "elastic-asleep", 2)
    described = site.describe("elastic-asleep")
    arm(tmp_path, "commit.before_flip", FailpointAction.STOP)
    gone = run.wait_for_line(lambda line: "server" in line and "is gone" in line)
    (pid,) = hit(tmp_path, "commit.before_flip")
    try:
        (victim,) = [each for each in described.servers if each.pid == pid]
        assert victim.id in gone
        run.wait_for_line(lambda line: line.startswith("step "))
        assert (site.describe("elastic-asleep").term or 0) > (described.term or 0)
    finally:
        os.kill(pid, signal.SIGCONT)
    refusal = run.wait_for_line(lambda line: "refused" in line and "owns the shard" in line)
    assert f"ours is {described.term}" in refusal
    hurry.touch()
    assert run.finish() == 0, run.output
    assert site.digest("elastic-asleep", 60) == site.digest("elastic-awake", 60)
