"""Kill processes while ranks make steps of their own: the bits stay, those of rank state included."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from chaos.check import exactly_once
from chaos.history import Reference, read_history
from psa_store.job.config import job_config_from_json
from psa_store.job.layout import TensorRole, layout_from_json
from psa_store.job.mode import parse_mode
from psa_store.optim.rank_state import rank_state_of
from psa_store.testing.journal import Journal
from tests.harness import TRAIN, Run, Site
from tests.kill.test_kill import VICTIMS, kill

STEPS, RANKS, COMMIT_EVERY = 120, 2, 3
PLAIN = "local:steps=4"
VARIANTS = {
    "plain": (PLAIN, "none"),
    "int8": (PLAIN, "int8"),
    "topk": (PLAIN, "topk:0.1"),
    "streaming": ("local:steps=4,fragments=2", "int4"),
    "overlap": ("local:steps=4,fragments=2,overlap", "none"),
}
"""Mode and compression, by a word for it."""


def start(
    site: Site, job: str, variant: str, folder: Path, *, slow_until: Path | None = None, **options: object
) -> Run:
    """``slow_until``: a file; until it exists, there is time to join the job."""
    mode, compress = VARIANTS[variant]
    defaults: dict[str, object] = {
        "workers": 2,
        "servers": 2,
        "ranks": RANKS,
        "commit_every": COMMIT_EVERY,
        "held": True,
    }
    pace = ["--pace-s", "0.3", "--paced-until", str(slow_until)] if slow_until else ["--pace-s", "0.01"]
    script = ["--steps", str(STEPS), *pace, *(["--bufferless"] if "overlap" in mode else [])]
    env = {"PSA_JOURNAL": str(folder)}
    return site.run(job, *script, env=env, mode=mode, compress=compress, **{**defaults, **options})


def final(mode: str) -> int:
    return STEPS // parse_mode(mode).round_steps


@pytest.fixture(scope="module")
def undisturbed(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """By variant, the digest of the undisturbed run: one worker, one server."""
    known: dict[str, str] = {}

    def of(variant: str) -> str:
        if variant not in known:
            job = f"rounds-calm-{variant}"
            run = start(site, job, variant, tmp_path_factory.mktemp(job), workers=1, servers=1)
            assert run.finish() == 0, run.output
            known[variant] = site.digest(job, final(VARIANTS[variant][0]))
        return known[variant]

    return of


def assert_each_round_counts_once(folder: Path, mode: str) -> None:
    with closing(Journal(folder, "test", "checker")) as own:
        own.record("scenario", steps=final(mode), ranks=RANKS, stages=1)
    violations = exactly_once.check(read_history(folder), Reference({}, ""))
    assert violations == []


@pytest.mark.parametrize(
    ("variant", "victims"),
    [
        pytest.param("plain", "a worker", marks=pytest.mark.long),
        pytest.param("plain", "a server", marks=pytest.mark.long),
        ("plain", "all workers"),
        pytest.param("int8", "a worker and a server", marks=pytest.mark.long),
        ("topk", "a worker"),
        ("streaming", "a worker and a server"),
        ("overlap", "a worker"),
        pytest.param("overlap", "all servers", marks=pytest.mark.long),
    ],
)
def test_killing_processes_changes_no_bit(
    site: Site, undisturbed: Callable[[str], str], rng: random.Random, tmp_path: Path, variant: str, victims: str
) -> None:
    job, mode = f"rounds-{variant}-" + victims.replace(" ", "-"), VARIANTS[variant][0]
    run = start(site, job, variant, tmp_path)
    for step in sorted(rng.sample(range(5, STEPS - 30), 2)):
        run.wait_for_step(step)
        pids = VICTIMS[victims](site, job, rng)
        kill(pids)
        print(f"step {step}: killed {pids}")
        run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    assert site.digest(job, final(mode)) == undisturbed(variant)
    if parse_mode(mode).fragments == 1:
        assert_each_round_counts_once(tmp_path, mode)


def test_everything_is_killed_and_the_same_command_resumes(
    site: Site, undisturbed: Callable[[str], str], rng: random.Random, tmp_path: Path
) -> None:
    for step in sorted(rng.sample(range(20, STEPS - 30), 2)):
        run = start(site, "rounds-everything", "plain", tmp_path)
        run.wait_for_step(step)
        run.kill()
    run = start(site, "rounds-everything", "plain", tmp_path)
    assert run.finish() == 0, run.output
    first = next(line for line in run.lines if line.startswith("step "))
    assert int(first.split()[1]) > 4, "the job started over instead of resuming"
    assert site.digest("rounds-everything", final(PLAIN)) == undisturbed("plain")


def test_workers_and_servers_come_and_go_without_a_lost_round(
    site: Site, undisturbed: Callable[[str], str], tmp_path: Path
) -> None:
    """A joining worker waits for a version at which the servers have the rank state; no process goes back for it.

    Only the round that is under way when a term begins is computed again.
    """
    job, env = "rounds-elastic", {"PSA_JOURNAL": str(tmp_path)}
    hurry = tmp_path / "hurry"
    run = start(site, job, "plain", tmp_path, slow_until=hurry, workers=1, servers=1, held=False)
    run.wait_for_step(10)
    server = site.psa("server", "--job", job, env=env)
    run.wait_for_line(lambda line: "hand-over at version" in line)
    worker = site.psa("worker", str(TRAIN), "--job", job, "--steps", str(STEPS), "--pace-s", "0.01", env=env)
    worker.wait_for_line(lambda line: line.startswith("step ") or "finished" in line)
    server.process.terminate()
    assert server.finish() == 0, server.output
    hurry.touch()
    assert run.finish() == 0 and worker.finish() == 0, run.output + worker.output
    assert site.digest(job, final(PLAIN)) == undisturbed("plain")
    history = read_history(tmp_path)
    resumed = {event["resume"] for event in history.of("published")}
    assert all(version % COMMIT_EVERY == 0 for version in resumed)
    times = Counter((event["step"], event["rank"]) for event in history.of("pushed"))
    assert len(times) == final(PLAIN) * RANKS
    assert {step for (step, _), count in times.items() if count > 1} <= resumed, "a round was lost"


def test_rank_state_lies_with_its_commits(site: Site, tmp_path: Path) -> None:
    for forget in (False, True):
        job, mode = f"rounds-forget-{forget}", PLAIN + (",forget" if forget else "")
        run = site.run(
            job, "--steps", str(STEPS), workers=1, servers=1, ranks=RANKS, commit_every=COMMIT_EVERY, mode=mode
        )
        assert run.finish() == 0, run.output
        with closing(site.store()) as store:
            found = store.read_job(job)
            assert found is not None
            config, layout = job_config_from_json(found[0]), layout_from_json(found[1])
            for shard in layout.shards_of(TensorRole.TRAINED):
                (head,) = store.heads(job, [shard.index])
                sizes = {s.name: s.size_bytes for s in head.manifests[-1].sections if s.name.startswith("rank.")}
                state = rank_state_of(config, shard)
                assert (state is None) is forget
                assert sizes == ({} if state is None else {f"rank.{r}": state.size_bytes for r in range(RANKS)})


@pytest.mark.parametrize(
    ("mode", "compress"), [(PLAIN, "none"), pytest.param("sync", "topk:0.1", marks=pytest.mark.long)]
)
def test_a_job_that_goes_on_beyond_its_end_has_the_bits_of_one_that_did_not_stop(
    site: Site, mode: str, compress: str
) -> None:
    """It ended between two commits of rank state, which the last pushes bring all the same."""
    total = "120"
    how: dict[str, object] = {"workers": 1, "servers": 1, "ranks": RANKS, "commit_every": 7}
    name = f"beyond-{mode.partition(':')[0]}"
    for job, ends in ((name, ("60", total)), (f"{name}-at-once", (total,))):
        for steps in ends:
            script = ["--steps", steps, "--total", total]
            run = site.run(job, *script, mode=mode, compress=compress, **how)
            assert run.finish() == 0, run.output
            assert "begins anew" not in run.output
    version = int(total) // parse_mode(mode).round_steps
    assert site.digest(name, version) == site.digest(f"{name}-at-once", version)


def test_more_fragments_than_shards_are_refused_before_the_job_exists(site: Site) -> None:
    mode = "local:steps=20,fragments=20"
    run = site.run("rounds-few", "--steps", "20", workers=1, servers=1, ranks=RANKS, mode=mode)
    assert run.finish() == 2 and "trained shards, so use at most" in run.output, run.output
    with closing(site.store()) as store:
        assert store.read_job("rounds-few") is None


def test_overlap_refuses_buffers_that_would_come_late(site: Site, tmp_path: Path) -> None:
    mode = "local:steps=4,overlap"
    run = site.run("rounds-late", "--steps", str(STEPS), workers=1, servers=1, ranks=RANKS, mode=mode)
    assert run.finish() == 2
    assert "changes its buffers" in run.output and "Traceback" not in run.output


def test_steps_must_be_whole_rounds(site: Site) -> None:
    run = site.run("rounds-uneven", "--steps", "121", workers=1, servers=1, ranks=RANKS, mode=PLAIN)
    assert run.finish() == 2 and "use a multiple of 4" in run.output, run.output
