"""What a script says to its worker has the same bits whatever dies.

Weights, state, a change, parameters out of use, an average of the weights, and a torch optimizer with its scheduler.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from psa_store.job.config import job_config_from_json
from tests.harness import Run, Site
from tests.kill.statements import CHANGE_AT

STEPS = 60
SCRIPT = Path(__file__).with_name("statements.py")
_SHOWN = re.compile(r"^step (\d+) rate (\S+) average (\w+)$")


class Shown(NamedTuple):
    rate: float
    average: str
    """Digest of the model that an evaluation saw."""


def start(site: Site, job: str, **options: object) -> Run:
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    defaults: dict[str, object] = {"workers": 2, "servers": 2, "ranks": 2, "commit_every": 10, "held": True}
    arguments = ["--steps", str(STEPS), "--change-after", str(change_after(site, job))]
    return site.run(job, *arguments, script=SCRIPT, env=root, **{**defaults, **options})


def change_after(site: Site, job: str) -> Path:
    """What the script's change waits for: were main to die just before it, another step would be the first with it."""
    return site.home / f"{job}.change"


def shown(run: Run) -> dict[int, Shown]:
    """By step; it must be the same, however often the step came."""
    found: dict[int, Shown] = {}
    for line in run.lines:
        if match := _SHOWN.match(line):
            here = Shown(float(match[2]), match[3])
            assert found.setdefault(int(match[1]), here) == here, f"step {match[1]} shows two things"
    return found


def state_in(run: Run) -> str:
    (line,) = {line for line in run.lines if line.startswith("state ")}
    return line


def changes(site: Site, job: str) -> list[int]:
    with site.store() as store:
        found = store.read_job(job)
    assert found is not None
    return [each.step for each in job_config_from_json(found[0]).changes]


class Calm(NamedTuple):
    digest: str
    state: str
    shown: dict[int, Shown]


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> Calm:
    change_after(site, "said-undisturbed").touch()
    # One worker: where a second one joins, the step before its first may be shown by neither as the main process.
    run = start(site, "said-undisturbed", workers=1, servers=1)
    assert run.finish() == 0, run.output
    seen = shown(run)
    assert sorted(seen) == list(range(1, STEPS + 1)) and len({each.average for each in seen.values()}) == STEPS
    assert [seen[step].rate for step in (1, 11, 21)] == pytest.approx([2e-3, 2e-2, 1e-2])
    return Calm(site.digest("said-undisturbed", STEPS), state_in(run), seen)


def test_killing_processes_changes_nothing_that_was_said(site: Site, undisturbed: Calm) -> None:
    run = start(site, "said-killed")
    for step, roles in ((13, ["workers"]), (CHANGE_AT + 2, ["servers"]), (44, ["workers", "servers"])):
        run.wait_for_step(step)
        for role in roles:
            for pid in site.pids("said-killed", role):
                os.kill(pid, signal.SIGKILL)
            run.wait_for_line(lambda line: "restarting" in line)
        change_after(site, "said-killed").touch()
    assert run.finish() == 0, run.output
    assert (site.digest("said-killed", STEPS), state_in(run)) == undisturbed[:2]
    assert changes(site, "said-killed") == [CHANGE_AT]
    seen = shown(run)
    assert seen.items() <= undisturbed.shown.items() and len(seen) > STEPS - 10


def test_a_resumed_run_says_the_same(site: Site, undisturbed: Calm) -> None:
    change_after(site, "said-resumed").touch()
    run = start(site, "said-resumed")
    run.wait_for_step(CHANGE_AT + 2)
    run.kill()
    before = shown(run)
    again = start(site, "said-resumed")
    assert again.finish() == 0, again.output
    assert (site.digest("said-resumed", STEPS), state_in(again)) == undisturbed[:2]
    assert changes(site, "said-resumed") == [CHANGE_AT]
    after = shown(again)
    assert before.items() | after.items() <= undisturbed.shown.items()
    assert min(after) > 10 and max(after) == STEPS, "it has resumed, and come to its end"
