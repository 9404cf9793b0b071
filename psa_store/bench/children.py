"""The processes of a benchmark: forked with everything imported, commanded through pipes, and ended for certain.

A child waits on its pipe for an :class:`Command`, carries it out and answers. It ends when the pipe does, that is, with
the benchmark, however that ends; if it waits for something else then, the kernel kills it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import torch

from psa_store.errors import PsaError, UserCodeFailed
from psa_store.launch.guard import die_with_parent

ANSWER_S = 300.0
_LEAVE_S = 60.0
_CLOSE_S = 10.0
_PRELOAD = ["psa_store.launch.forkserver_guard", "psa_store.bench.preload"]


class Command(Enum):
    """What a child is told, besides a number of steps to do."""

    CHECK = auto()
    LEAVE = auto()


@dataclass(frozen=True, slots=True)
class Done:
    """The order is carried out; where it was to do steps, when the timed ones began and ended on the machine's
    monotonic clock."""

    begin_s: float = 0.0
    end_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """The child cannot go on, and says why."""

    reason: str


class Stepper:
    """What a child can be told to do."""

    def prepare(self) -> None:
        """Before a block of steps, untimed."""

    def step(self) -> None:
        """One step: returns when the new parameters are visible in this process."""
        raise NotImplementedError

    def settle(self) -> None:
        """After a block, untimed: wait for the end of what would disturb those that are measured next."""

    def check(self, steps: int) -> None:
        """Raise unless the parameters are what ``steps`` steps give."""


class CommandPipe:
    """A child's end of its pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def handle(self, stepper: Stepper) -> None:
        """Report that this process is set up, and carry out commands until told to leave.

        A block begins with one step that is not timed: it brings all members into step, and what the others have pushed
        out of the caches back in.
        """
        self._answer(Done())
        steps = 0
        while True:
            try:
                command: int | Command = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                return
            if command is Command.LEAVE:
                return
            if command is Command.CHECK:
                stepper.check(steps)
                self._answer(Done())
                continue
            assert isinstance(command, int)
            stepper.prepare()
            stepper.step()
            begin_s = time.monotonic()
            for _ in range(command):
                stepper.step()
            end_s = time.monotonic()
            steps += 1 + command
            stepper.settle()
            self._answer(Done(begin_s, end_s))

    def fail(self, reason: str) -> None:
        self._answer(Failed(reason))

    def _answer(self, answer: Done | Failed) -> None:
        try:
            self._pipe.send(answer)
        except BrokenPipeError:
            sys.exit(0)  # the benchmark has ended, as where it has no more orders: what fails now fails because of that


class Child:
    """A process, as the benchmark sees it."""

    def __init__(self, context: Any, name: str, env: Mapping[str, str], target: Callable[..., None], *arguments: Any):
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, dict(env), target, arguments), name=name)
        try:
            self._process.start()
        except BaseException:
            self._pipe.close()
            raise
        finally:
            theirs.close()

    def tell(self, command: int | Command) -> None:
        """Give an order; a number is steps to do."""
        self._pipe.send(command)

    def answer(self, timeout_s: float = ANSWER_S) -> Done:
        """Wait for the answer to the last order; raises UserCodeFailed if there will be none."""
        ready = connection.wait([self._pipe, self._process.sentinel], timeout_s)
        if not ready:
            raise UserCodeFailed(f"{self.name} does not answer for {timeout_s:.0f} s")
        try:
            answer: Done | Failed = self._pipe.recv()
        except EOFError as error:
            self._process.join(_CLOSE_S)
            raise UserCodeFailed(f"{self.name} died, with exit code {self._process.exitcode}") from error
        if isinstance(answer, Failed):
            raise UserCodeFailed(f"{self.name}: {answer.reason}")
        return answer

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self._process.terminate()

    def join(self, timeout_s: float = _LEAVE_S) -> None:
        """Wait for the end of a process that was told to leave; raises UserCodeFailed if it does not end well."""
        self._process.join(timeout_s)
        if self._process.exitcode not in (0, -signal.SIGTERM):
            raise UserCodeFailed(f"{self.name} does not leave, or not in order: exit code {self._process.exitcode}")

    def hang_up(self) -> None:
        self._pipe.close()

    def end(self, end_s: float) -> None:
        """Wait until ``end_s``, then kill; afterwards the process is gone."""
        self._process.join(max(0.0, end_s - time.monotonic()))
        self._process.kill()
        self._process.join()
        self._process.close()


class ChildProcesses:
    """Starts children, and ends those that are left when it is closed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._children: list[Child] = []

    def spawn(
        self, name: str, target: Callable[..., None], *arguments: Any, env: Mapping[str, str] | None = None
    ) -> Child:
        """Start a process that runs ``target(commands, *arguments)``, with ``env`` added to our environment."""
        child = Child(self._context, name, env or {}, target, *arguments)
        self._children.append(child)
        return child

    def close(self) -> None:
        """End all children: they get some seconds to clean up after themselves."""
        for child in self._children:
            child.hang_up()
            child.terminate()
        end_s = time.monotonic() + _CLOSE_S
        for child in self._children:
            child.end(end_s)
        self._children.clear()


def _main(pipe: Connection, env: Mapping[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """In the child. Ctrl-C reaches the whole group; the benchmark alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        sys.exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see forkserver_guard
    os.environ.update(env)
    torch.set_num_threads(1)
    commands = CommandPipe(pipe)
    try:
        target(commands, *arguments)
    except PsaError as error:
        commands.fail(str(error))
        sys.exit(1)
    except Exception:
        commands.fail(traceback.format_exc())
        sys.exit(1)
