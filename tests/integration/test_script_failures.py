"""An exception in a training script is tried again once at each place, like a death; then it is the script's fault."""

from __future__ import annotations

from pathlib import Path

from tests.harness import Site

FAILING = Path(__file__).parent / "failing.py"


def test_an_exception_that_passes_is_survived_with_the_same_bits(site: Site, tmp_path: Path) -> None:
    digests = set()
    for times in (0, 1):
        job, notes = f"fails-{times}", tmp_path / str(times)
        notes.mkdir()
        run = site.run(job, str(times), str(notes), script=FAILING, workers=2)
        assert run.finish() == 0, run.output
        assert run.output.count("OSError: the disk of the network") == times
        digests.add(site.digest(job, 20))
    assert len(digests) == 1


def test_the_same_exception_at_the_same_place_ends_the_run_and_the_same_command_resumes(
    site: Site, tmp_path: Path
) -> None:
    run = site.run("fails-again", "2", str(tmp_path), script=FAILING, workers=2)
    assert run.finish() == 1, run.output
    assert run.output.count("OSError: the disk of the network") == 2
    assert "OSError at step 7, rank 1. Its traceback is above" in run.output
    again = site.run("fails-again", "2", str(tmp_path), script=FAILING, workers=2)
    assert again.finish() == 0, again.output


def test_a_budget_of_no_restarts_is_kept(site: Site, tmp_path: Path) -> None:
    run = site.run("fails-once-too-often", "1", str(tmp_path), script=FAILING, workers=2, max_restarts=0)
    assert run.finish() == 1, run.output
