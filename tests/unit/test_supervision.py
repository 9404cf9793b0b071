"""What happens to a child that ended, and the code that is reported of it: two tables."""

from __future__ import annotations

import signal

import pytest

from psa_store.cluster import ProcessRole
from psa_store.launch.supervisor import Verdict, after_exit, reported_code


@pytest.mark.parametrize(
    ("exit_code", "restarts_left", "stopping", "verdict"),
    [
        (0, 5, False, Verdict.DONE),
        (0, 0, False, Verdict.DONE),
        (-9, 5, False, Verdict.RESTART),
        (-11, 1, False, Verdict.RESTART),
        (-9, 0, False, Verdict.FAIL),
        (3, 5, False, Verdict.RESTART),
        (3, 0, False, Verdict.FAIL),
        (255, 1, False, Verdict.RESTART),
        (255, 0, False, Verdict.FAIL),
        (1, 5, False, Verdict.FAIL),
        (2, 5, False, Verdict.FAIL),
        (4, 5, False, Verdict.FAIL),
        (-15, 5, True, Verdict.DONE),
        (1, 0, True, Verdict.DONE),
    ],
)
def test_verdicts(exit_code: int, restarts_left: int, stopping: bool, verdict: Verdict) -> None:
    assert after_exit(exit_code, restarts_left, stopping) is verdict


@pytest.mark.parametrize(
    ("exit_code", "restarts_left", "stopping", "verdict"),
    [
        (1, 5, False, Verdict.RESTART),
        (1, 0, False, Verdict.FAIL),
        (1, 5, True, Verdict.DONE),
        (2, 5, False, Verdict.FAIL),
        (4, 5, False, Verdict.FAIL),
    ],
)
def test_verdicts_on_a_script_that_fails_at_a_place_for_the_first_time(
    exit_code: int, restarts_left: int, stopping: bool, verdict: Verdict
) -> None:
    assert after_exit(exit_code, restarts_left, stopping, new_failure=True) is verdict


@pytest.mark.parametrize(("exit_code", "verdict"), [(1, Verdict.RESTART), (2, Verdict.FAIL), (4, Verdict.FAIL)])
def test_a_server_that_raised_is_started_again_within_the_budget(exit_code: int, verdict: Verdict) -> None:
    """It runs no script: what it met came from outside."""
    assert after_exit(exit_code, 1, stopping=False, role=ProcessRole.SERVER) is verdict
    assert after_exit(exit_code, 0, stopping=False, role=ProcessRole.SERVER) is Verdict.FAIL


@pytest.mark.parametrize(
    ("exit_code", "stopping", "reported"),
    [
        (0, False, 0),
        (2, False, 2),
        (4, True, 4),
        (255, False, 1),
        (-signal.SIGKILL, False, 1),
        (-signal.SIGKILL, True, 1),
        (-signal.SIGTERM, False, 1),
        (-signal.SIGTERM, True, 0),
    ],
)
def test_reported_codes_are_documented_ones(exit_code: int, stopping: bool, reported: int) -> None:
    assert reported_code(exit_code, stopping) == reported
