"""Failpoints action once, where they are armed; and each that is named stands in the code at one place."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import psa_store
from psa_store.testing.failpoints import ENV, FAILPOINTS, FailpointAction, arm, disarm, failpoint, hit

NAME = "commit.chunk"
PASSING = (
    f"from psa_store.testing.failpoints import failpoint\nfor i in range(5): failpoint({NAME!r}, i)\nprint('passed')"
)


def pass_it(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PASSING], env={ENV: str(folder)}, capture_output=True, text=True, timeout=60, check=False
    )


def test_an_armed_failpoint_strikes_the_first_that_passes_and_nobody_after(tmp_path: Path) -> None:
    arm(tmp_path, NAME, FailpointAction.KILL)
    assert pass_it(tmp_path).returncode == -signal.SIGKILL
    assert pass_it(tmp_path).stdout == "passed\n"
    assert len(hit(tmp_path, NAME)) == 1


def test_arming_again_forgets_whom_it_struck_before(tmp_path: Path) -> None:
    for _ in range(2):
        arm(tmp_path, NAME, FailpointAction.KILL)
        assert hit(tmp_path, NAME) == []
        assert pass_it(tmp_path).returncode == -signal.SIGKILL
        assert len(hit(tmp_path, NAME)) == 1


def test_it_waits_for_its_index(tmp_path: Path) -> None:
    arm(tmp_path, NAME, FailpointAction.KILL, at_least=5)
    assert pass_it(tmp_path).stdout == "passed\n"
    arm(tmp_path, NAME, FailpointAction.KILL, at_least=4)
    assert pass_it(tmp_path).returncode == -signal.SIGKILL


def test_disarming_tells_whether_it_was_in_time(tmp_path: Path) -> None:
    arm(tmp_path, NAME, FailpointAction.KILL)
    assert disarm(tmp_path, NAME)
    assert pass_it(tmp_path).stdout == "passed\n"
    assert not disarm(tmp_path, NAME)
    assert hit(tmp_path, NAME) == []


def test_it_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV, raising=False)
    failpoint(NAME)


def test_each_named_failpoint_stands_in_the_code_once() -> None:
    """Or once in each aggregator or strategy, of which a job has one."""
    package = Path(psa_store.__file__).parent
    found: dict[str, list[str]] = {}
    for path in package.rglob("*.py"):
        for name in re.findall(r"failpoint\(\"([a-z_.]+)\"", path.read_text()):
            found.setdefault(name, []).append(str(path.relative_to(package)))
    assert found.keys() == FAILPOINTS.keys()
    for name, files in found.items():
        assert len(files) == len(set(files)), f"{name} stands twice in a file: {files}"
        assert len(files) == 1 or all("/aggregator/" in file or "/strategy/" in file for file in files), (
            f"{name}: {files}"
        )
