"""Helpers of tests that run real jobs: start `psa run`, follow it, kill what it started, and judge the result."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from chaos.cluster.spawner import Process, Spawner
from psa_store.checkpoint.reader import open_version
from psa_store.config import Settings
from psa_store.observe.status import JobStatus, describe
from psa_store.storage import RedisStore
from tests import forked

TRAIN = Path(__file__).parents[1] / "chaos" / "train.py"
PSA = [sys.executable, "-m", "psa_store.cli"]
_STEP = re.compile(r"^step (\d+)")
_OUTPUT_CHARS_MAX = 1 << 28
_LABEL = re.compile(r"^\[(?:worker|server)-\d+\] ")
PATIENCE_S = 240.0
"""How long a test waits for an event that must come. It bounds hangs only: a busy machine must not reach it."""


LIVE: list[Followed] = []
"""What a test has started; a fixture kills what a failed test left running."""


class Followed(ABC):
    """Processes whose output is followed line by line, without the labels of `psa run`.

    They are a session, which begins with process ``pid``.
    """

    pid: int

    def __init__(self, output: IO[str]) -> None:
        self.lines: list[str] = []
        self._output = output
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="test-reader")
        self._reader.start()
        LIVE.append(self)

    def _read(self) -> None:
        left = _OUTPUT_CHARS_MAX
        while left > 0 and (line := self._output.readline(left)):
            left -= len(line)
            self._queue.put(_LABEL.sub("", line.rstrip("\n")))
        if left <= 0:  # or a process that prints without end takes the memory of all tests
            self._queue.put(f"it printed more than {_OUTPUT_CHARS_MAX} characters, and is ended")
            for pid in _session_pids(self.pid):
                with_suppress_kill(pid, signal.SIGKILL)
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

    def wait_for_lines(self, *texts: str) -> None:
        """Read on until each of the texts has come in a line, in any order: they are of several processes."""
        left = set(texts)

        def last(line: str) -> bool:
            left.difference_update({text for text in left if text in line})
            return not left

        self.wait_for_line(last)

    def wait_for_step(self, step: int, timeout_s: float = PATIENCE_S) -> None:
        def reached(line: str) -> bool:
            found = _STEP.match(line)
            return found is not None and int(found[1]) >= step

        self.wait_for_line(reached, timeout_s)

    def finish(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end; returns the exit code."""
        try:
            code = self._ended(timeout_s)
        except TimeoutError:
            self._stacks()
            self.kill()
            raise AssertionError("it did not end; output:\n" + "\n".join(self.lines[-400:])) from None
        self._reader.join()
        self._take_rest()
        return code

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def kill(self) -> None:
        """SIGKILL the whole session. Idempotent."""
        for pid in _session_pids(self.pid):
            with_suppress_kill(pid, signal.SIGKILL)
        self._ended(30)
        self._reader.join(timeout=30)
        self._output.close()
        if self in LIVE:
            LIVE.remove(self)

    def last_words(self) -> str:
        """End what is still running, and return the last of what it printed, with where it stood."""
        self._stacks()
        return f"output of {self.pid}:\n" + "\n".join(self.lines[-400:])

    def _stacks(self) -> None:
        """End what hangs such that each process says where it stood; the lines are added to those read."""
        for pid in _session_pids(self.pid):
            with_suppress_kill(pid, signal.SIGABRT)
        self._reader.join(timeout=20)
        self._take_rest()

    def _take_rest(self) -> None:
        while not self._queue.empty():
            if (line := self._queue.get()) is not None:
                self.lines.append(line)

    @abstractmethod
    def _ended(self, timeout_s: float) -> int:
        """The exit code, once there is one, and nothing more to read; raises TimeoutError."""


WITH_STACKS = {"PYTHONFAULTHANDLER": "1"}
"""SIGABRT makes a process say where its threads are."""


class Run(Followed):
    """A running `psa` command."""

    def __init__(
        self,
        arguments: list[str],
        env: Mapping[str, str],
        end: Path | None = None,
        spawner: Spawner | None = None,
        before: Sequence[str] = (),
    ) -> None:
        """Start it, by forking the ``spawner`` if there is one.

        ``end``: a file for which the script waits before its last steps; :meth:`finish` makes it. ``before``: a command
        that starts the one of its arguments.
        """
        self.arguments, self._end = arguments, end
        env = {**WITH_STACKS, **os.environ, **env}
        readable, writable = os.pipe()
        self.process: subprocess.Popen[bytes] | Process
        try:
            if spawner is not None and not before and forked.can_fork(env):
                task = [arguments, env, str(Path.cwd())]
                self.process = spawner.spawn("psa", "tests.forked:psa", task, {}, None, writable)
            else:
                self.process = subprocess.Popen(
                    [*before, *PSA, *arguments],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=writable,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        finally:
            os.close(writable)
        self.pid = self.process.pid
        super().__init__(os.fdopen(readable))

    def finish(self, timeout_s: float = PATIENCE_S) -> int:
        if self._end is not None:
            self._end.touch()
        return super().finish(timeout_s)

    def _ended(self, timeout_s: float) -> int:
        # Others of the session may go on after the command: it has ended when the last one closes the output.
        self._reader.join(timeout_s)
        if self._reader.is_alive():
            raise TimeoutError
        return self.process.wait(30)


class Servers:
    """Servers of one job, in processes of their own: `psa server` without two seconds of imports for each."""

    def __init__(self, site: Site, job: str, count: int = 1) -> None:
        self.each = [ForkedServer(site, job) for _ in range(count)]

    def stop(self) -> None:
        """Have them leave, one after the other, as SIGTERM does. Nothing happens if they have ended."""
        left = [each for each in self.each if each in LIVE]
        for each in left:
            each.wait_for_line(lambda line: "serving" in line)
        for each in left:
            each.process.terminate()
        for each in left:
            assert each.finish() == 0, each.output
            each.kill()


class ForkedServer(Followed):
    """A server that was forked from one that has imported everything."""

    def __init__(self, site: Site, job: str) -> None:
        readable, writable = os.pipe()
        assert site.spawner is not None, "servers are forked at the site of the session"
        env = {name: value for name, value in os.environ.items() if name.startswith("PSA_")}  # a test's own, too
        try:
            target = "psa_store.launch.processes:server_main"
            self.process = site.spawner.spawn("server", target, [job], env, None, writable)
        finally:
            os.close(writable)
        self.pid = self.process.pid
        super().__init__(os.fdopen(readable))

    def _ended(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)


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
    spawner: Spawner | None = None

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
        self,
        job: str,
        *extra: str,
        script: Path = TRAIN,
        env: Mapping[str, str] | None = None,
        held: bool = False,
        before: Sequence[str] = (),
        **options: Any,
    ) -> Run:
        """`psa run`; keyword arguments are options of `psa run`, ``extra`` are arguments of the script.

        ``held``: the job does not end before :meth:`Run.finish` is called, however late a test comes to disturb it.
        """
        flags = [part for name, value in options.items() for part in _flag(name, value)]
        end = self.home / f"{job}.end" if held else None
        hold = ["--end-after", str(end)] if end else []
        return self.psa("run", *flags, str(script), "--job", job, *extra, *hold, env=env, end=end, before=before)

    def psa(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        end: Path | None = None,
        before: Sequence[str] = (),
    ) -> Run:
        """Start a `psa` command here; ``env`` is added to what says where here is."""
        return Run(list(arguments), {**self.env, **(env or {})}, end, self.spawner, before)

    def told(
        self,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        only: bool = False,
        merged: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a `psa` command here, forked, to its end, as ``subprocess.run`` does.

        ``env`` is added to what says where here is; it is all of ours that there is if ``only``. ``merged``: what it
        prints to standard error goes where the rest goes.
        """
        assert self.spawner is not None
        words = [str(each) for each in arguments]
        around = {name: value for name, value in os.environ.items() if not (only and name.startswith("PSA_"))}
        whole = {**WITH_STACKS, **around, **({} if only else self.env), **(env or {})}
        assert forked.can_fork(whole)
        with tempfile.TemporaryDirectory() as name:
            output, errors = Path(name) / "output", Path(name) / "errors"
            task = [words, whole, str(folder or Path.cwd()), None if merged else str(errors)]
            process = self.spawner.spawn("psa", "tests.forked:psa", task, {}, None, output)
            try:
                code = process.wait(PATIENCE_S)
            finally:
                for pid in _session_pids(process.pid):
                    with_suppress_kill(pid, signal.SIGKILL)
            said = "" if merged else errors.read_text()
            return subprocess.CompletedProcess(words, code, output.read_text(), said)

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
