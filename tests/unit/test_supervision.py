"""What happens to a child that ended: a table."""

from __future__ import annotations

import pytest

from psa_store.launch import Verdict, after_exit


@pytest.mark.parametrize(
    ("exit_code", "restarts_left", "stopping", "verdict"),
    [
        (0, 5, False, Verdict.DONE),
        (-9, 5, False, Verdict.RESTART),
        (-11, 1, False, Verdict.RESTART),
        (-9, 0, False, Verdict.FAIL),
        (3, 5, False, Verdict.RESTART),
        (3, 0, False, Verdict.FAIL),
        (1, 5, False, Verdict.FAIL),
        (2, 5, False, Verdict.FAIL),
        (4, 5, False, Verdict.FAIL),
        (-15, 5, True, Verdict.DONE),
        (1, 0, True, Verdict.DONE),
    ],
)
def test_verdicts(exit_code: int, restarts_left: int, stopping: bool, verdict: Verdict) -> None:
    assert after_exit(exit_code, restarts_left, stopping) is verdict
