"""An average of the weights has the bits of an undisturbed run, whatever dies, and shows them to each evaluation."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.harness import Run, Site

STEPS = 60
_SHOWN = re.compile(r"^average (\d+) (\w+)$")


def start(site: Site, job: str, **options: object) -> Run:
    defaults: dict[str, object] = {"workers": 2, "servers": 2, "ranks": 2, "commit_every": 10}
    return site.run(job, "--steps", str(STEPS), "--average", "0.9", **{**defaults, **options})


def shown(run: Run) -> dict[int, str]:
    """By step, the digest of the model that an evaluation saw; it must be one, however often the step came."""
    found: dict[int, str] = {}
    for line in run.lines:
        if match := _SHOWN.match(line):
            assert found.setdefault(int(match[1]), match[2]) == match[2], f"step {match[1]} shows two averages"
    return found


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> tuple[str, dict[int, str]]:
    run = start(site, "average-undisturbed")
    assert run.finish() == 0, run.output
    seen = shown(run)
    assert sorted(seen) == list(range(1, STEPS + 1))
    return site.digest("average-undisturbed", STEPS), seen


@pytest.mark.parametrize("victims", ["workers", "servers"])
def test_killing_processes_changes_no_bit(site: Site, undisturbed: tuple[str, dict[int, str]], victims: str) -> None:
    job = f"average-{victims}"
    run = start(site, job)
    for step in (13, 34):
        run.wait_for_step(step)
        for pid in site.pids(job, victims):
            os.kill(pid, signal.SIGKILL)
        run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    digest, seen = undisturbed
    assert site.digest(job, STEPS) == digest
    assert shown(run).items() <= seen.items() and len(shown(run)) > STEPS - 10


def test_one_worker_and_a_resumed_run_show_the_same(site: Site, undisturbed: tuple[str, dict[int, str]]) -> None:
    digest, seen = undisturbed
    run = start(site, "average-resumed", workers=1, servers=1)
    run.wait_for_step(25)
    run.kill()
    before = shown(run)
    assert before.items() <= seen.items()
    again = start(site, "average-resumed", workers=1, servers=1)
    assert again.finish() == 0, again.output
    assert site.digest("average-resumed", STEPS) == digest
    assert shown(again).items() <= seen.items() and max(shown(again)) == STEPS
