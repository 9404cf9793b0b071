"""Helpers of tests that run real jobs: start `psa run`, follow it, kill what it started, and judge the result."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psa_store.checkpoint.reader import open_version
from psa_store.config import Settings
from psa_store.observe.status import JobStatus, describe
from psa_store.storage import RedisStore

TRAIN = Path(__file__).parents[1] / "chaos" / "train.py"
PSA = [sys.executable, "-m", "psa_store.cli"]
_STEP = re.compile(r"^step (\d+)")
_LABEL = re.compile(r"^\[(?:worker|server)-\d+\] ")
PATIENCE_S = 240.0
"""How long a test waits for an event that must come. It bounds hangs only: a busy machine must not reach it."""


LIVE: list[Run] = []
"""Commands that a test has started; a fixture kills what a failed test left running."""


@dataclass
class Run:
    """A running `psa` command whose output is followed line by line, without the labels of `psa run`."""

    arguments: list[str]
    env: Mapping[str, str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [*PSA, *self.arguments],
            env={"PYTHONFAULTHANDLER": "1", **os.environ, **self.env},  # for _stacks
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        LIVE.append(self)
        self._reader = threading.Thread(target=self._read, name="test-reader")
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(_LABEL.sub("", line.rstrip("\n")))
        self._queue.put(None)

    def wait_for_line(self, wanted: Callable[[str], bool], timeout_s: float = PATIENCE_S) -> str:
        """Read on until a line fits; fails with everything that was printed if none comes in time."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                line = self._queue.get(timeout=left_s)
            except queue.Empty:
                self._stacks()
                break
            if line is None:
                break
            self.lines.append(line)
            if wanted(line):
                return line
        raise AssertionError("the awaited line did not come; output:\n" + "\n".join(self.lines[-400:]))

    def wait_for_step(self, step: int, timeout_s: float = PATIENCE_S) -> None:
        def reached(line: str) -> bool:
            found = _STEP.match(line)
            return found is not None and int(found[1]) >= step

        self.wait_for_line(reached, timeout_s)

    def finish(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end; returns the exit code."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                line = self._queue.get(timeout=left_s)
            except queue.Empty:
                break
            if line is None:
                self._reader.join()
                return self.process.wait(timeout=30)
            self.lines.append(line)
        self._stacks()
        self.kill()
        raise AssertionError("the command did not end; output:\n" + "\n".join(self.lines[-400:]))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def _stacks(self) -> None:
        """End what hangs such that each process says where it stood; the lines are added to those read."""
        for pid in _session_pids(self.process.pid):
            with_suppress_kill(pid, signal.SIGABRT)
        self._reader.join(timeout=20)
        while not self._queue.empty():
            if (line := self._queue.get()) is not None:
                self.lines.append(line)

    def kill(self) -> None:
        """SIGKILL the command and everything in its session. Idempotent."""
        for pid in _session_pids(self.process.pid):
            with_suppress_kill(pid, signal.SIGKILL)
        self.process.wait(timeout=30)
        self._reader.join(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self in LIVE:
            LIVE.remove(self)


def _session_pids(session: int) -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    pids.append(int(entry.name))
            except ProcessLookupError:
                pass
    return pids


def with_suppress_kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def stop_process(pid: int) -> None:
    """SIGSTOP a process and wait until each of its threads stands still: until then one may still answer."""
    os.kill(pid, signal.SIGSTOP)
    while any(_state(thread) not in "TZX" for thread in Path(f"/proc/{pid}/task").iterdir()):
        os.sched_yield()


def _state(thread: Path) -> str:
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


@dataclass(frozen=True)
class Site:
    """A Redis and a ZooKeeper to run jobs against."""

    redis: str
    zookeeper: str
    home: Path

    @property
    def env(self) -> dict[str, str]:
        return {
            "PSA_REDIS": self.redis,
            "PSA_ZOOKEEPER": self.zookeeper,
            "PSA_HOME": str(self.home),
            "PSA_SESSION_TIMEOUT_S": "4",
        }

    @property
    def settings(self) -> Settings:
        return Settings(redis=self.redis, zookeeper=self.zookeeper, home=self.home)

    def store(self) -> RedisStore:
        return RedisStore(self.redis, timeout_s=5.0)

    def run(
        self, job: str, *extra: str, script: Path = TRAIN, env: Mapping[str, str] | None = None, **options: Any
    ) -> Run:
        """`psa run`; keyword arguments are options of `psa run`, ``extra`` are arguments of the script."""
        flags = [part for name, value in options.items() for part in _flag(name, value)]
        return Run(["run", *flags, str(script), "--job", job, *extra], {**self.env, **(env or {})})

    def describe(self, job: str) -> JobStatus:
        with closing(self.store()) as store:
            return describe(job, self.settings, store)

    def pids(self, job: str, role: str) -> list[int]:
        """Process ids of the living ``servers`` or ``workers`` of a job.

        A busy supervisor may not have taken one off the list yet that the test has killed.
        """
        listed = [member.pid for member in getattr(self.describe(job), role)]
        return [pid for pid in listed if _state(Path(f"/proc/{pid}")) not in ("X", "Z")]

    def wait_until_serving(self, run: Run, job: str, servers: int) -> None:
        """Wait until so many own shards: those that were not there in time join by hand-overs.

        What the run printed until then has been read.
        """
        run.wait_for_step(1)
        while True:
            found = self.describe(job).servers
            run.wait_for_step(1 + max((each.version or 0 for each in found), default=0))
            if sum(each.shards > 0 for each in found) >= servers:
                return

    def digest(self, job: str, version: int) -> str:
        """sha256 of all parameters and the whole optimizer state of one version, read from Redis."""
        with closing(self.store()) as store:
            return open_version(store, job, version).digest()


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, str(value)]
