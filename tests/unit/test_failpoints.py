"""A failpoint acts once, where it is armed; each that is named stands in the code at one place."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import psa_store
from psa_store.testing.failpoints import ENV, FAILPOINTS, FailpointAction, arm, disarm, hit

NAME = "commit.chunk"
PASSING = (
    f"from psa_store.testing.failpoints import failpoint\nfor i in range(5): failpoint({NAME!r}, i)\nprint('passed')"
)


def pass_it(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PASSING],
        env={ENV: str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_an_armed_failpoint_hits_the_first_process_that_passes_and_none_after(tmp_path: Path) -> None:
    arm(tmp_path, NAME, FailpointAction.KILL)
    assert pass_it(tmp_path).returncode == -signal.SIGKILL
    assert pass_it(tmp_path).stdout == "passed\n"
    assert len(hit(tmp_path, NAME)) == 1


def test_arming_again_forgets_earlier_hits(tmp_path: Path) -> None:
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


def test_it_looks_at_the_environment_once_if_that_names_no_folder() -> None:
    counting = """
import os
from psa_store.testing.failpoints import failpoint
reads = []
get, os.environ.__class__.get = os.environ.__class__.get, lambda self, name: (reads.append(name), get(self, name))[1]
for _ in range(5): failpoint("commit.chunk")
print(reads)
"""
    done = subprocess.run(
        [sys.executable, "-c", counting], env={}, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout == f"['{ENV}']\n"


def test_a_process_that_is_forked_and_then_gets_its_environment_can_be_hit(tmp_path: Path) -> None:
    forking = f"""
import os, sys
from psa_store.testing.failpoints import failpoint
failpoint({NAME!r})
if (pid := os.fork()) == 0:
    os.environ[{ENV!r}] = {str(tmp_path)!r}
    failpoint({NAME!r})
    os._exit(0)
sys.exit(-os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    arm(tmp_path, NAME, FailpointAction.KILL)
    done = subprocess.run([sys.executable, "-c", forking], env={}, timeout=300)
    assert done.returncode == signal.SIGKILL


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
