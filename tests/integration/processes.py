"""Processes of tests of `launch`: started by hand, and watched until they end."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE_S = 120.0
GONE_S = 2.0
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def ends_within(timeout_s: float, *pids: int) -> Iterator[None]:
    """What happens inside ends these processes, soon."""
    handles = [os.pidfd_open(pid) for pid in pids]
    try:
        yield
        end_s = time.monotonic() + timeout_s
        for pid, handle in zip(pids, handles, strict=True):
            assert select.select([handle], [], [], max(0.0, end_s - time.monotonic()))[0], f"{pid} still runs"
    finally:
        for handle in handles:
            os.close(handle)


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process, leader of its own process group, whose output can be read."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
