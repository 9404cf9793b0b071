"""A model in stages trains to the same bits with any number of workers, whatever dies."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import psa_store as psa
from chaos.history import read_history
from chaos.job import STAGED
from psa_store.optim.tensors import as_bytes
from psa_store.testing.failpoints import ENV, FailpointAction, arm, hit
from tests.harness import Run, Site

STEPS = 40


def start(
    site: Site,
    job: str,
    *arguments: str,
    carrier: str = "auto",
    failpoints: Path | None = None,
    held: bool = False,
    **how: object,
) -> Run:
    root = {"PSA_CARRIER": carrier, "PYTHONPATH": str(Path(__file__).parents[2])}
    if failpoints is not None:
        root |= {ENV: str(failpoints), "PSA_JOURNAL": str(failpoints)}
    how = {"workers": 2, "servers": 2, "ranks": 1, "commit_every": 10, **how}
    return site.run(job, "--steps", str(STEPS), *arguments, script=STAGED, env=root, held=held, **how)


@pytest.mark.parametrize(
    ("stages", "ranks"), [*(pytest.param(*cut, marks=pytest.mark.long) for cut in ((1, 1), (2, 1))), (4, 2)]
)
def test_any_number_of_workers_gives_the_same_bits(site: Site, stages: int, ranks: int) -> None:
    digests = set()
    for workers in sorted({1, 2, 3, stages * ranks}):
        job = f"stages-{stages}-{ranks}-{workers}"
        cut = ["--stages", str(stages), "--dropout", "0.1", "--clip", "1.0", "--tied"]
        run = start(site, job, *cut, workers=workers, ranks=ranks)
        assert run.finish() == 0, run.output
        digests.add(site.digest(job, STEPS))
    assert len(digests) == 1


def values(site: Site, job: str) -> dict[str, bytes]:
    """All parameters and buffers, by name."""
    with psa.Store(job, site.redis) as store:
        return {name: bytes(as_bytes(tensor.flatten())) for name, tensor in store.state_dict(STEPS).items()}


def test_any_cut_gives_the_same_bits_where_nothing_is_tied(site: Site) -> None:
    found = []
    for stages in (1, 2, 4):
        job = f"cut-{stages}"
        run = start(site, job, "--stages", str(stages), workers=2, servers=1, ranks=2)
        assert run.finish() == 0, run.output
        found.append(values(site, job))
    assert found[0] == found[1] == found[2]


CUT = ["--stages", "4", "--dropout", "0.1", "--clip", "1.0", "--tied", "--average", "--state"]
PLACES = [("cell.sent", 0), ("cell.backward", 0), ("cell.backward", 2), ("push.middle", 0), ("push.done", 0)]
"""An activation is sent; before the first backward pass; between two; gradients are pushed, in part, and all."""


def averages(journals: Path) -> dict[tuple[int, int], set[str]]:
    """By version and stage, what workers had as the average of its parameters."""
    found: dict[tuple[int, int], set[str]] = defaultdict(set)
    for event in read_history(journals).of("average"):
        found[event["version"], event["stage"]].add(event["digest"])
    return found


@pytest.fixture(scope="module")
def calm(site: Site, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[tuple[int, int], set[str]]]:
    """The digest of a run that was left alone, and the averages in it."""
    journals = tmp_path_factory.mktemp("calm")
    run = start(site, "cells-calm", *CUT, workers=2, ranks=2, failpoints=journals)
    assert run.finish() == 0, run.output
    return site.digest("cells-calm", STEPS), averages(journals)


@pytest.mark.parametrize("carrier", ["auto", pytest.param("tcp", marks=pytest.mark.long)])
def test_killing_processes_anywhere_changes_no_bit(
    site: Site, calm: tuple[str, dict[tuple[int, int], set[str]]], tmp_path: Path, carrier: str
) -> None:
    job = f"cells-{carrier}"
    paced = [*CUT, "--pace-s", "0.05"]
    run = start(site, job, *paced, workers=3, ranks=2, failpoints=tmp_path, held=True, carrier=carrier)
    run.wait_for_step(2)
    for place, index in PLACES:
        arm(tmp_path, place, FailpointAction.KILL, at_least=index)
        run.wait_for_line(lambda line: "restarting" in line)
        assert hit(tmp_path, place)
    os.kill(site.pids(job, "servers")[0], signal.SIGKILL)
    run.wait_for_line(lambda line: "restarting" in line)
    for role in ("workers", "servers"):
        for process in site.pids(job, role):
            os.kill(process, signal.SIGKILL)
        run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    digest, averages_calm = calm
    assert site.digest(job, STEPS) == digest
    found = averages(tmp_path)
    both = found.keys() & averages_calm.keys()
    assert {stage for _, stage in both} == {0, 1, 2, 3}
    assert all(found[each] == averages_calm[each] and len(found[each]) == 1 for each in both)


@pytest.mark.parametrize("carrier", ["auto", pytest.param("tcp", marks=pytest.mark.long)])
def test_stages_in_memory_one_after_the_other_change_no_bit(
    site: Site, calm: tuple[str, dict[tuple[int, int], set[str]]], tmp_path: Path, carrier: str
) -> None:
    """Workers are killed while a stage goes forward only, between its backward passes, and as its gradients leave."""
    cut = [*CUT, "--resident", "1"]
    job = f"resident-{carrier}"
    run = start(site, job, *cut, workers=2, ranks=2, failpoints=tmp_path, held=True, carrier=carrier)
    run.wait_for_step(2)
    for place, index in (("cell.sent", 0), ("cell.backward", 2), ("push.middle", 0)):
        arm(tmp_path, place, FailpointAction.KILL, at_least=index)
        run.wait_for_line(lambda line: "restarting" in line)
        assert hit(tmp_path, place)
    assert run.finish() == 0, run.output
    assert site.digest(job, STEPS) == calm[0]


def await_hit(folder: Path, place: str) -> int:
    """Wait until a process stands still there; returns its id."""
    while not (found := hit(folder, place)):
        time.sleep(0.01)  # a process that is stopped can not say it; the test has a deadline
    return found[0]


def test_a_worker_that_wakes_late_and_a_server_that_dies_with_a_full_relay_change_no_bit(
    site: Site, tmp_path: Path
) -> None:
    """And the other worker, which had ended its part of the step, computes the cells of the late one and no others."""
    cut = ["--stages", "2", "--dropout", "0.1", "--tied"]
    calm = start(site, "late-calm", *cut, workers=1)
    assert calm.finish() == 0, calm.output
    run = start(site, "late", *cut, workers=2, failpoints=tmp_path, held=True)
    run.wait_for_step(2)
    arm(tmp_path, "push.middle", FailpointAction.STOP)
    paused = await_hit(tmp_path, "push.middle")
    begun = [event for event in read_history(tmp_path).of("computing") if event.pid == paused]
    run.wait_for_step(begun[-1]["step"] + 2)  # its cells are computed by the other one, when ZooKeeper has given it up
    pushed = [event for event in read_history(tmp_path).of("pushed") if event["step"] == begun[-1]["step"]]
    assert Counter(event["stage"] for event in pushed) == {0: 1, 1: 1}
    os.kill(paused, signal.SIGCONT)
    run.wait_for_step(begun[-1]["step"] + 8)
    arm(tmp_path, "cell.backward", FailpointAction.STOP, at_least=2)
    paused = await_hit(tmp_path, "cell.backward")
    for process in site.pids("late", "servers"):
        os.kill(process, signal.SIGKILL)
    run.wait_for_line(lambda line: "restarting" in line)
    os.kill(paused, signal.SIGCONT)
    assert run.finish() == 0, run.output
    assert site.digest("late", STEPS) == site.digest("late-calm", STEPS)


def test_what_topk_holds_back_goes_with_its_cell(site: Site, tmp_path: Path) -> None:
    """A worker's death takes all back to the last commit, from where the next holder of a cell has it."""
    cut = ["--stages", "2", "--dropout", "0.1", "--clip", "1.0", "--tied"]
    calm = start(site, "topk-calm", *cut, workers=1, ranks=2, compress="topk:0.1")
    assert calm.finish() == 0, calm.output
    run = start(site, "topk", *cut, workers=3, ranks=2, compress="topk:0.1", failpoints=tmp_path, held=True)
    run.wait_for_step(12)
    for place in ("push.middle", "push.done"):
        arm(tmp_path, place, FailpointAction.KILL)
        run.wait_for_lines("restarting", "rank is without its worker")
        assert hit(tmp_path, place)
    assert run.finish() == 0, run.output
    assert site.digest("topk", STEPS) == site.digest("topk-calm", STEPS)


def test_a_job_is_forked_and_goes_on_in_other_stages(site: Site, tmp_path: Path) -> None:
    def psa_checkpoint(*arguments: str) -> None:
        run = site.psa("checkpoint", *arguments, env={"PYTHONPATH": str(Path(__file__).parents[2])})
        assert run.finish() == 0, run.output

    whole = start(site, "cuts-whole", "--stages", "1", workers=1, servers=1)
    assert whole.finish() == 0, whole.output
    half = start(site, "cuts-half", "--stages", "1", "--until", "20", workers=1, servers=1)
    assert half.finish() == 0, half.output
    psa_checkpoint("save", "cuts-half", "--name", "half")
    psa_checkpoint("export", "cuts-half", str(tmp_path / "half"), "half")
    like = f"{STAGED} --job any --steps {STEPS} --stages 4"
    psa_checkpoint("import", str(tmp_path / "half"), "--as", "cuts-four", "--like", like)
    four = start(site, "cuts-four", "--stages", "4", workers=2, servers=1)
    assert four.finish() == 0, four.output
    assert values(site, "cuts-four") == values(site, "cuts-whole")
    psa_checkpoint("save", "cuts-four", "--name", "end")
    psa_checkpoint("fork", "cuts-four", "end", "--as", "cuts-fork")
    assert values(site, "cuts-fork") == values(site, "cuts-whole")
    psa_checkpoint("export", "cuts-fork", str(tmp_path / "end"))
    like = f"{STAGED} --job any --steps {STEPS} --stages 1"
    psa_checkpoint("import", str(tmp_path / "end"), "--as", "cuts-one", "--like", like)
    assert values(site, "cuts-one") == values(site, "cuts-whole")
