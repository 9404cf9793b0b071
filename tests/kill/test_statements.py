"""What a script says to its worker has the same bits whatever dies: weights, state, a change, parameters out of use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from psa_store.job.config import job_config_from_json
from tests.harness import Run, Site
from tests.kill.statements import CHANGE_AT

STEPS = 60
SCRIPT = Path(__file__).with_name("statements.py")


def start(site: Site, job: str) -> Run:
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return site.run(job, "--steps", str(STEPS), script=SCRIPT, env=root, workers=2, servers=2, ranks=2, commit_every=10)


def state_in(run: Run) -> str:
    (line,) = {line for line in run.lines if line.startswith("state ")}
    return line


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> tuple[str, str]:
    run = start(site, "said-undisturbed")
    assert run.finish() == 0, run.output
    return site.digest("said-undisturbed", STEPS), state_in(run)


@pytest.mark.parametrize("victims", ["workers", "servers"])
def test_killing_processes_changes_nothing_that_was_said(
    site: Site, undisturbed: tuple[str, str], victims: str
) -> None:
    job = f"said-{victims}"
    run = start(site, job)
    for step in (13, CHANGE_AT + 2, 44):
        run.wait_for_step(step)
        os.kill(site.pids(job, victims)[0], signal.SIGKILL)
        run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    assert (site.digest(job, STEPS), state_in(run)) == undisturbed
    with site.store() as store:
        found = store.read_job(job)
    assert found is not None
    assert [each.step for each in job_config_from_json(found[0]).changes] == [CHANGE_AT]
