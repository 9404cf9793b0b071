"""Checkpoints of running jobs: training goes on from what they hold, whichever process dies while they are taken."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from psa_store.checkpoint.catalog import StoredJob, read_job
from psa_store.storage import Head, Manifest, ShardState
from psa_store.testing.failpoints import FailpointAction, arm
from tests.harness import Run, Site

STEPS = 90
OF_SERVERS = (
    "checkpoint.opened",
    "checkpoint.before_pins",
    "checkpoint.pinned",
    "checkpoint.done",
    "checkpoint.written",
)
OF_ROLLBACK = ("rollback.begun", "rollback.restored", "rollback.unwound")


def start(
    site: Site,
    job: str,
    mode: str = "sync",
    *,
    slow_until: Path | None = None,
    failpoints: Path | None = None,
    **env: str,
) -> Run:
    """``slow_until``: a file; until it exists, there is time for commands while the job goes on."""
    surroundings = {**env, **({"PSA_FAILPOINTS": str(failpoints)} if failpoints else {})}
    pace = ["--pace-s", "0.7", "--paced-until", str(slow_until)] if slow_until else ["--pace-s", "0.01"]
    script = ["--steps", str(STEPS), *pace, "--bufferless"]
    return site.run(job, *script, env=surroundings, workers=2, servers=2, ranks=2, mode=mode, commit_every=5)


def checkpoint(site: Site, *arguments: str, failpoints: Path | None = None) -> subprocess.CompletedProcess[str]:
    run = site.psa("checkpoint", *arguments, env={"PSA_FAILPOINTS": str(failpoints)} if failpoints else None)
    code = run.finish()
    return subprocess.CompletedProcess(run.arguments, code, run.output)


def stored(site: Site, job: str) -> StoredJob:
    with closing(site.store()) as store:
        return read_job(store, job)


def pins(found: StoredJob, name: str) -> list[Head]:
    heads = [found.heads[shard.index] for shard in found.layout.versioned]
    assert all(name in head.pins for head in heads)
    return heads


class Undisturbed(dict[str, str]):
    """By mode, the digest of the whole state of a run that was left alone, which is made when it is asked for."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def __missing__(self, mode: str) -> str:
        job = f"alone-{mode.partition(':')[0]}"
        run = start(self._site, job, mode)
        assert run.finish() == 0, run.output
        (version,) = stored(self._site, job).versions()[-1:]
        self[mode] = self._site.digest(job, version)
        return self[mode]


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> dict[str, str]:
    return Undisturbed(site)


@pytest.mark.parametrize("mode", ["sync", pytest.param("local:steps=3", marks=pytest.mark.long)])
def test_a_run_that_goes_back_to_a_checkpoint_ends_with_the_same_bits(
    site: Site, undisturbed: dict[str, str], tmp_path: Path, mode: str
) -> None:
    job = f"back-{mode.partition(':')[0]}"
    run = start(site, job, mode, slow_until=tmp_path / "hurry")
    site.wait_until_serving(run, job, 2)
    taken = checkpoint(site, "save", job, "--name", "early")
    assert taken.returncode == 0, taken.stdout
    (tmp_path / "hurry").touch()
    assert run.finish() == 0, run.output
    taking = next(i for i, line in enumerate(run.lines) if "taking a checkpoint" in line)
    end = next(i for i, line in enumerate(run.lines) if line.startswith("finished"))  # then they leave, one by one
    terms = [line for line in run.lines[taking:end] if "new term" in line]
    assert not terms, "a checkpoint is no reason for a term"
    found = stored(site, job)
    last, early = found.versions()[-1], found.checkpoints["early"].version
    assert site.digest(job, last) == undisturbed[mode], "a checkpoint has changed what training computes"
    assert early < found.versions()[0], "it would be there without being kept"
    assert checkpoint(site, "rollback", job, "early").returncode == 2, "it was not asked, and went on"
    assert checkpoint(site, "rollback", job, "early", "--yes").returncode == 0
    assert stored(site, job).versions() == [early]
    again = start(site, job, mode)
    assert again.finish() == 0, again.output
    assert site.digest(job, last) == undisturbed[mode]
    assert checkpoint(site, "verify", job).returncode == 0


@pytest.mark.parametrize("place", OF_SERVERS)
def test_a_server_that_dies_while_a_checkpoint_is_taken(
    site: Site, undisturbed: dict[str, str], tmp_path: Path, place: str
) -> None:
    """The attempt ends, the next one succeeds under the new term, and nothing of the first is left."""
    job = "dies-" + place.replace(".", "-").replace("_", "-")
    run = start(site, job, slow_until=tmp_path / "hurry", failpoints=tmp_path)
    run.wait_for_line(lambda line: "new term" in line and "servers=2" in line)
    arm(tmp_path, place, FailpointAction.KILL)
    taken = checkpoint(site, "save", job, "--name", "kept")
    assert taken.returncode == 0, taken.stdout
    assert list(tmp_path.glob(f"{place}.hit.*")), "no process was killed"
    (tmp_path / "hurry").touch()
    assert run.finish() == 0, run.output
    found = stored(site, job)
    assert found.whole("kept") and found.checkpoints["kept"].named, "it would be removed with automatic ones"
    assert {name for head in found.heads.values() for name in head.pins} == {"kept"}
    assert site.digest(job, STEPS) == undisturbed["sync"]
    assert checkpoint(site, "verify", job, "kept").returncode == 0


@pytest.mark.parametrize("mode", ["async", pytest.param("ssp:staleness=1", marks=pytest.mark.long)])
def test_on_arrival_all_shards_hold_the_same_pushes(site: Site, tmp_path: Path, mode: str) -> None:
    job = f"marked-{mode.partition(':')[0]}"
    run = start(site, job, mode, slow_until=tmp_path / "hurry")
    run.wait_for_step(3)
    for name in ("a", "b"):
        taken = checkpoint(site, "save", job, "--name", name)
        assert taken.returncode == 0, taken.stdout
    found = stored(site, job)
    for name in ("a", "b"):
        cuts = {
            tuple(value for what, value in sorted(head.pins[name].scalars.items()) if what.startswith("clock."))
            for head in pins(found, name)
        }
        assert len(cuts) == 1 and sum(*cuts) == found.checkpoints[name].version
    assert checkpoint(site, "rollback", job, "a", "--yes").returncode == 0  # workers had gone on: they must go back
    (tmp_path / "hurry").touch()
    assert run.finish() == 0, run.output
    for head in pins(stored(site, job), "a"):
        assert [head.manifests[-1].scalars[f"clock.{rank}"] for rank in range(2)] == [STEPS, STEPS]


@pytest.mark.parametrize("place", [*OF_ROLLBACK[:-1], pytest.param(OF_ROLLBACK[-1], marks=pytest.mark.long), None])
def test_going_back_under_way_and_cut_off_anywhere(
    site: Site, undisturbed: dict[str, str], tmp_path: Path, place: str | None
) -> None:
    job = "under-way-" + (place or "whole").replace(".", "-")
    hurry = tmp_path / "hurry"
    run = start(site, job, slow_until=hurry)
    run.wait_for_step(3)
    assert checkpoint(site, "save", job, "--name", "early").returncode == 0
    early = stored(site, job).checkpoints["early"].version
    run.wait_for_step(early + 4)
    if place is not None:
        arm(tmp_path, place, FailpointAction.KILL)
    done = checkpoint(site, "rollback", job, "early", "--yes", failpoints=tmp_path)
    assert done.returncode == (0 if place is None else -signal.SIGKILL), done.stdout
    if place in (None, "rollback.unwound"):  # later on, servers would find out with their next commit
        run.wait_for_line(lambda line: f"resume={early}" in line or f"version={early}" in line)
    hurry.touch()
    assert run.finish() == 0, run.output
    if place is None:
        assert sum(line.startswith(f"step {early + 2} ") for line in run.lines) == 2, "it never went back"
    assert site.digest(job, STEPS) == undisturbed["sync"]


def test_a_fork_shares_and_outlives_what_it_began_from(site: Site, undisturbed: dict[str, str], tmp_path: Path) -> None:
    parent = start(site, "parent", slow_until=tmp_path / "hurry")
    parent.wait_for_step(3)
    assert checkpoint(site, "save", "parent", "--name", "early").returncode == 0
    (tmp_path / "hurry").touch()
    assert parent.finish() == 0, parent.output
    assert checkpoint(site, "fork", "parent", "early", "--as", "child").returncode == 0
    assert checkpoint(site, "fork", "parent", "early", "--as", "child").returncode == 2, "there is one of this name"
    assert checkpoint(site, "prune", "parent", "early", "--yes").returncode == 0
    assert checkpoint(site, "verify", "child").returncode == 0, "what both shared went with the parent's name for it"
    child = start(site, "child")
    assert child.finish() == 0, child.output
    assert site.digest("child", STEPS) == undisturbed["sync"]
    assert checkpoint(site, "prune", "parent", "--keep", "1", "--yes").returncode == 0
    found = stored(site, "parent")
    changing = [found.heads[shard.index] for shard in found.layout.versioned]
    assert not any(head.pins for head in changing), "the fork has left it, and it is kept still"


def test_a_fork_that_dies_is_begun_again(site: Site, tmp_path: Path) -> None:
    run = start(site, "source")
    assert run.finish() == 0, run.output
    arm(tmp_path, "fork.adopted", FailpointAction.KILL)
    died = checkpoint(site, "fork", "source", str(STEPS), "--as", "second", failpoints=tmp_path)
    assert died.returncode == -signal.SIGKILL, died.stdout
    with closing(site.store()) as store:
        assert not store.has_job("second")
    assert checkpoint(site, "fork", "source", str(STEPS), "--as", "second").returncode == 0
    assert checkpoint(site, "verify", "second").returncode == 0
    assert checkpoint(site, "verify", "source").returncode == 0, "what both share went with the first attempt"


def test_by_interval_and_when_told_to_leave(site: Site, undisturbed: dict[str, str], tmp_path: Path) -> None:
    job = "automatic"
    settings = {"PSA_CHECKPOINT_EVERY_S": "1", "PSA_CHECKPOINT_KEEP": "2"}
    run = start(site, job, slow_until=tmp_path / "never", **settings)
    run.wait_for_line(lambda line: "checkpoint " in line and "version=" in line and "megabytes" in line)
    step = int(next(line for line in reversed(run.lines) if line.startswith("step")).split()[1])
    run.wait_for_step(step + 3)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output
    found = stored(site, job)
    newest = list(found.checkpoints.values())[-1]
    assert newest.reason.value == "end" and newest.version == found.versions()[-1]
    assert 1 <= len(found.checkpoints) <= 2
    again = start(site, job, **settings)
    assert again.finish() == 0, again.output
    assert site.digest(job, STEPS) == undisturbed["sync"]
    assert len(stored(site, job).checkpoints) == 2, "older ones were kept"


def test_a_request_that_is_given_up_leaves_nothing(site: Site, tmp_path: Path) -> None:
    """Workers are paused, so the cut is not reached in time; when they go on, it is given up."""
    job = "impatient"
    # Paused for less than their session: a member that is gone is not waited for.
    run = start(site, job, slow_until=tmp_path / "hurry", PSA_SESSION_TIMEOUT_S="60")
    run.wait_for_step(3)
    workers = site.pids(job, "workers")
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        late = checkpoint(site, "save", job, "--name", "precious", "--timeout", "2")
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    assert late.returncode == 3, late.stdout
    (tmp_path / "hurry").touch()
    assert run.finish() == 0, run.output
    found = stored(site, job)
    assert not found.checkpoints and not any(head.pins for head in found.heads.values())


def test_a_document_of_another_version_is_no_reason_to_stop(site: Site) -> None:
    job = "unreadable"
    with closing(site.store()) as store:
        store.write_checkpoint(job, "of-tomorrow", '{"name": "of-tomorrow", "format": 9}')
    run = start(site, job, PSA_CHECKPOINT_EVERY_S="1")
    assert run.finish() == 0, run.output
    found = stored(site, job)
    assert found.checkpoints and "of-tomorrow" not in found.checkpoints
    with closing(site.store()) as store:
        assert "of-tomorrow" in store.read_checkpoints(job), "it was not ours to remove"


def test_a_fork_takes_nothing_over_that_a_dead_creator_left(site: Site) -> None:
    run = start(site, "origin")
    assert run.finish() == 0, run.output
    with closing(site.store()) as store:
        layout = stored(site, "origin").layout
        store.seal("haunted", [0, 1], 7, "f" * 64)
        left = ShardState(0, {"param": ("float32", memoryview(b"left"))}, {}, None)
        assert isinstance(next(store.commit_each("haunted", 7, 1000, [left], keep=3))[1], Manifest)
    assert checkpoint(site, "fork", "origin", str(STEPS), "--as", "haunted").returncode == 0
    found = stored(site, "haunted")
    assert found.versions() == [STEPS]
    assert {head.layout for head in found.heads.values()} == {layout.fingerprint}
    assert checkpoint(site, "verify", "haunted").returncode == 0
