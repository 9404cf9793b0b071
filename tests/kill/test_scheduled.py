"""A torch optimizer with a torch scheduler, ticked by the script: the bits and rates of an undisturbed run."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.harness import Run, Site

STEPS = 60
SCRIPT = Path(__file__).with_name("scheduled.py")
_SHOWN = re.compile(r"^step (\d+) rate (\S+)$")


def start(site: Site, job: str) -> Run:
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return site.run(job, "--steps", str(STEPS), script=SCRIPT, env=root, workers=2, servers=2, ranks=2, commit_every=10)


def rates(run: Run) -> dict[int, float]:
    """By step, the rate that the script was shown, however often the step came."""
    found: dict[int, float] = {}
    for line in run.lines:
        if match := _SHOWN.match(line):
            assert found.setdefault(int(match[1]), float(match[2])) == float(match[2])
    return found


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> tuple[str, dict[int, float]]:
    run = start(site, "scheduled-undisturbed")
    assert run.finish() == 0, run.output
    seen = rates(run)
    assert sorted(seen) == list(range(1, STEPS + 1))
    assert seen[1] == pytest.approx(2e-3) and seen[11] == pytest.approx(2e-2) and seen[21] == pytest.approx(1e-2)
    return site.digest("scheduled-undisturbed", STEPS), seen


@pytest.mark.parametrize("victims", ["workers", "servers"])
def test_killing_processes_changes_no_bit_and_no_rate(
    site: Site, undisturbed: tuple[str, dict[int, float]], victims: str
) -> None:
    job = f"scheduled-{victims}"
    run = start(site, job)
    for step in (13, 34):
        run.wait_for_step(step)
        os.kill(site.pids(job, victims)[0], signal.SIGKILL)
        run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    digest, seen = undisturbed
    assert site.digest(job, STEPS) == digest
    assert rates(run).items() <= seen.items() and len(rates(run)) > STEPS - 10
