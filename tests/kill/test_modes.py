"""Kill processes while pushes are applied on arrival: none that was acknowledged is lost, none counts twice."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest

import psa_store as psa
from chaos.check.arrival import check_arrivals
from chaos.history import History, read_history
from psa_store.checkpoint.reader import tensors_digest
from psa_store.job.config import job_config_from_json
from psa_store.job.layout import layout_from_json
from tests.harness import TRAIN, Run, Site
from tests.kill.test_kill import VICTIMS, kill

STEPS, RANKS = 120, 2


def start(
    site: Site,
    job: str,
    mode: str,
    folder: Path,
    carrier: str = "auto",
    compress: str = "none",
    pace_s: float = 0.02,
) -> Run:
    env = {"PSA_JOURNAL": str(folder), "PSA_CARRIER": carrier}
    script = ["--steps", str(STEPS), "--pace-s", str(pace_s)]  # slowly enough for what is to happen meanwhile
    how = {"workers": 2, "servers": 2, "ranks": RANKS, "mode": mode, "compress": compress, "commit_every": 3}
    return site.run(job, *script, env=env, held=True, **how)


def assert_all_pushes_count_once(site: Site, job: str, folder: Path) -> History:
    history = read_history(folder)
    assert check_arrivals(history) == []
    with closing(site.store()) as store:
        found = store.read_job(job)
        assert found is not None
        for head in store.heads(job, [shard.index for shard in layout_from_json(found[1]).versioned]):
            final = head.manifests[-1]
            assert final.version == STEPS * RANKS
            assert [final.scalars[f"clock.{rank}"] for rank in range(RANKS)] == [STEPS] * RANKS
    with psa.Store(job, redis=site.redis) as stored:
        last = tensors_digest(stored.state_dict())
    assert {event["digest"] for event in history.of("ended") if event["finished"]} == {last}, "a model is not the last"
    return history


@pytest.mark.parametrize(
    ("mode", "victims", "carrier", "compress"),
    [
        pytest.param("async", "a server", "auto", "none", marks=pytest.mark.long),
        ("async", "all servers", "tcp", "none"),
        ("async", "a worker and a server", "auto", "topk:0.1"),
        ("ssp:staleness=2", "a server", "tcp", "int4"),
        ("ssp:staleness=2", "a worker", "auto", "none"),
        pytest.param("ssp:staleness=2", "all workers", "auto", "none", marks=pytest.mark.long),
    ],
)
def test_every_acknowledged_push_counts_once(
    site: Site, rng: random.Random, tmp_path: Path, mode: str, victims: str, carrier: str, compress: str
) -> None:
    job = f"{mode.partition(':')[0]}-{carrier}-" + victims.replace(" ", "-")
    run = start(site, job, mode, tmp_path, carrier, compress)
    for step in sorted(rng.sample(range(5, STEPS - 30), 2)):
        run.wait_for_step(step)
        pids = VICTIMS[victims](site, job, rng)
        kill(pids)
        print(f"step {step}: killed {pids}")
        run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    history = assert_all_pushes_count_once(site, job, tmp_path)
    assert history.of("settled"), "nothing was ever acknowledged"
    if "server" in victims:
        assert history.of("replayed"), "nothing had to be pushed again: the kill proves nothing"


def test_everything_is_killed_and_the_same_command_resumes(site: Site, rng: random.Random, tmp_path: Path) -> None:
    for step in sorted(rng.sample(range(15, STEPS - 30), 2)):
        run = start(site, "async-everything", "async", tmp_path)
        run.wait_for_step(step)
        run.kill()
        print(f"step {step}: killed everything")
    run = start(site, "async-everything", "async", tmp_path)
    assert run.finish() == 0, run.output
    assert_all_pushes_count_once(site, "async-everything", tmp_path)


def test_a_rank_whose_worker_never_comes_back_is_inherited(site: Site, tmp_path: Path) -> None:
    """The worker that inherits it is waiting for this very rank when it gets it."""
    job, env = "ssp-inherits", {"PSA_JOURNAL": str(tmp_path)}
    script = ["--steps", str(STEPS), "--pace-s", "0.02", "--meet", "2"]
    how = {"workers": 1, "servers": 1, "ranks": RANKS, "mode": "ssp:staleness=1", "commit_every": 3}
    run = site.run(job, *script, env=env, **how)
    run.wait_for_step(10)
    guest = site.psa("worker", str(TRAIN), "--job", job, *script, env=env)
    run.wait_for_step(30)
    guest.kill()
    assert run.finish() == 0, run.output
    assert_all_pushes_count_once(site, job, tmp_path)


def test_servers_join_and_leave_without_losing_a_push(site: Site, tmp_path: Path) -> None:
    run = start(site, "async-elastic", "async", tmp_path, pace_s=0.1)
    run.wait_for_step(20)
    guest = site.psa("server", "--job", "async-elastic", env={"PSA_JOURNAL": str(tmp_path)})
    run.wait_for_line(lambda line: "hand-over at version" in line)
    guest.process.terminate()
    assert guest.finish() == 0, guest.output
    run.wait_for_line(lambda line: "hand-over at version" in line)
    assert run.finish() == 0, run.output
    assert_all_pushes_count_once(site, "async-elastic", tmp_path)


def test_a_job_keeps_its_mode(site: Site, tmp_path: Path) -> None:
    assert start(site, "keeps-mode", "ssp:staleness=1", tmp_path).finish() == 0
    again = start(site, "keeps-mode", "async", tmp_path)
    assert again.finish() == 2 and "mode='ssp:staleness=1'" in again.output, again.output
    with closing(site.store()) as store:
        found = store.read_job("keeps-mode")
        assert found is not None and str(job_config_from_json(found[0]).mode) == "ssp:staleness=1"
