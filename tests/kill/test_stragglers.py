"""A worker that stands still delays no other, where the mode says so; with speculation the bits stay."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from chaos.history import read_history
from tests.harness import Run, Site

STEPS, RANKS = 120, 3


def start(site: Site, job: str, mode: str, folder: Path) -> Run:
    script = ["--steps", str(STEPS), "--pace-s", "0.01"]
    env = {"PSA_JOURNAL": str(folder)}
    return site.run(job, *script, env=env, workers=3, servers=2, ranks=RANKS, commit_every=10, mode=mode)


def others(site: Site, job: str) -> list[int]:
    """The workers that do not hold rank 0, whose lines we read."""
    return [worker.pid for worker in site.describe(job).workers if 0 not in worker.ranks]


@pytest.mark.parametrize("mode", ["sync:backup=1", pytest.param("sync:speculate", marks=pytest.mark.long)])
def test_steps_go_on_while_a_worker_is_stopped(site: Site, tmp_path: Path, mode: str) -> None:
    job = "stopped-" + mode.partition(":")[2].partition("=")[0]
    run = start(site, job, mode, tmp_path)
    run.wait_for_step(10)
    victim = others(site, job)[0]
    os.kill(victim, signal.SIGSTOP)
    try:
        run.wait_for_step(25)
        assert victim in [each.pid for each in site.describe(job).workers if each.ranks], "it lost its rank"
    finally:
        os.kill(victim, signal.SIGCONT)
    assert run.finish() == 0, run.output
    history = read_history(tmp_path)
    assert all(event["finished"] for event in history.of("ended")), "the worker that was stopped was left behind"
    if mode == "sync:speculate":
        assert history.of("speculated")
        calm = start(site, "calm-speculate", "sync", tmp_path)
        assert calm.finish() == 0, calm.output
        assert site.digest(job, STEPS) == site.digest("calm-speculate", STEPS)
    else:
        counts = [len(event["shards"]) for event in history.of("applied")]
        assert min(counts) == RANKS - 1


@pytest.mark.parametrize("mode", [pytest.param("sync:backup=1", marks=pytest.mark.long), "sync:speculate"])
def test_a_worker_and_a_server_may_die_all_the_same(site: Site, tmp_path: Path, mode: str) -> None:
    job = "killed-" + mode.partition(":")[2].partition("=")[0]
    run = start(site, job, mode, tmp_path)
    run.wait_for_step(20)
    os.kill(others(site, job)[0], signal.SIGKILL)
    run.wait_for_line(lambda line: "restarting" in line)
    run.wait_for_step(60)
    os.kill(site.pids(job, "servers")[0], signal.SIGKILL)
    run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    ended = read_history(tmp_path).of("ended")
    assert len({event["digest"] for event in ended}) == 1, "a model is not the last"
