"""A model in stages trains to the same bits with any number of workers, whatever dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Run, Site

SCRIPT = Path(__file__).with_name("staged.py")
STEPS = 40


def start(site: Site, job: str, *arguments: str, held: bool = False, **how: object) -> Run:
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    how = {"workers": 2, "servers": 2, "ranks": 1, "commit_every": 10, **how}
    return site.run(job, "--steps", str(STEPS), *arguments, script=SCRIPT, env=root, held=held, **how)


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 1), (4, 2)])
def test_any_number_of_workers_gives_the_same_bits(site: Site, stages: int, ranks: int) -> None:
    digests = set()
    for workers in sorted({1, 2, 3, stages * ranks}):
        job = f"stages-{stages}-{ranks}-{workers}"
        run = start(site, job, "--stages", str(stages), "--dropout", "0.1", "--clip", "1.0", workers=workers, ranks=ranks)
        assert run.finish() == 0, run.output
        digests.add(site.digest(job, STEPS))
    assert len(digests) == 1
