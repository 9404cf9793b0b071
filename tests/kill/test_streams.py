"""A stream is trained on once, sample by sample, whatever dies; and the bits are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.harness import Run, Site
from tests.kill.streamed import LENGTH

STEPS = 90
"""Of 8 samples: a pass, and a part of the next."""
SCRIPT = Path(__file__).with_name("streamed.py")


def start(site: Site, job: str, *arguments: str) -> Run:
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    how = {"workers": 2, "servers": 2, "ranks": 2, "commit_every": 10}
    return site.run(job, "--steps", str(STEPS), *arguments, script=SCRIPT, env=root, held=True, **how)


def samples(run: Run) -> list[int]:
    """In the order of (step, rank); each may have been computed several times, always from the same samples."""
    read: dict[tuple[int, int], list[int]] = {}
    for line in run.lines:
        if line.startswith("read "):
            step, rank, *indices = map(int, line.split()[1:])
            assert read.setdefault((step, rank), indices) == indices
    assert sorted(read) == [(step, rank) for step in range(STEPS) for rank in range(2)]
    return [index for _, indices in sorted(read.items()) for index in indices]


@pytest.mark.parametrize("loader", [False, pytest.param(True, marks=pytest.mark.long)], ids=["dataset", "loader"])
def test_each_sample_counts_once_whatever_dies(site: Site, loader: bool) -> None:
    job, arguments = f"stream-{loader}", ["--loader"] if loader else []
    calm = start(site, f"{job}-calm", *arguments)
    assert calm.finish() == 0, calm.output
    run = start(site, job, *arguments)
    for step, victims in ((13, "workers"), (40, "servers"), (66, "workers")):
        run.wait_for_step(step)
        os.kill(site.pids(job, victims)[0], signal.SIGKILL)
        run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    seen = samples(run)
    assert sorted(seen[:LENGTH]) == list(range(LENGTH))
    assert len(set(seen[LENGTH:])) == len(seen) - LENGTH
    assert seen == samples(calm)
    assert site.digest(job, STEPS) == site.digest(f"{job}-calm", STEPS)
