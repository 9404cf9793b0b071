"""Starts the processes of one machine, watches them, and starts them again when they die.

Children are forked from a *fork server* that has imported everything already, so a restart takes milliseconds. When
we end, however that is, the kernel kills the fork server (``forkserver_guard``) and sends SIGTERM to its children.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from psa_store import logs
from psa_store.cluster import ProcessRole
from psa_store.errors import UserCodeFailed
from psa_store.launch.guard import SAFE_PATH, die_with_parent
from psa_store.launch.output import Followed, Output, Pipe, redirect
from psa_store.observe.formatting import names
from psa_store.wire.announce import listen_announcements, read_announcement

_RETRYABLE_EXIT = 3
_LOST_EXIT = 255  # what multiprocessing reports when the fork server was killed, and its children with it
_TICK_S = 0.2
_START_S = 30.0
_START_AGAIN_S = 0.01


class Verdict(Enum):
    RESTART = auto()
    DONE = auto()
    FAIL = auto()


def after_exit(
    exit_code: int,
    restarts_left: int,
    stopping: bool,
    *,
    role: ProcessRole = ProcessRole.WORKER,
    new_failure: bool = False,
) -> Verdict:
    """What to do about a child that ended; a negative exit code is the signal that killed it. Pure.

    A death and an unreachable dependency may pass; bad usage and damaged data do not. An exception of the script may,
    if it is a ``new_failure``: no process has failed so at that place before. So may any of a server, which runs no
    script: what it met came from outside.
    """
    if exit_code == 0 or stopping:
        return Verdict.DONE
    excused = exit_code == 1 and (new_failure or role is ProcessRole.SERVER)
    passing = exit_code < 0 or exit_code in (_RETRYABLE_EXIT, _LOST_EXIT) or excused
    return Verdict.RESTART if passing and restarts_left > 0 else Verdict.FAIL


def reported_code(exit_code: int, stopping: bool) -> int:
    """The code by which the command reports a child that ended: a documented one, never a signal's number. Pure."""
    if stopping and exit_code == -signal.SIGTERM:
        return 0  # it was asked to leave before it had set up anything to clean up
    return 1 if exit_code < 0 or exit_code == _LOST_EXIT else exit_code


@dataclass(eq=False, slots=True)
class Child:
    """One process; ``member`` is its name in ZooKeeper, new with every start."""

    role: ProcessRole
    member: str
    process: BaseProcess
    number: int
    """From 1; a child that is started again keeps it."""
    target: Callable[..., None]
    arguments: tuple[Any, ...]
    output: Followed

    @property
    def exit_code(self) -> int:
        code = self.process.exitcode
        assert code is not None, "still running"
        return code


class Supervisor:
    """Owns the children, from :meth:`spawn` to :meth:`close`, and meanwhile SIGTERM and SIGINT.

    Not thread-safe: use it in the main thread, which must live as long as the children shall.

    Args:
        preload: modules that the fork server imports once, so that children do not.
        restarts_max: how often children may be started again, all together.
        env: environment of every child, besides our own.
        on_exit: called with a child as soon as it has ended, before anything else is done about it.
        on_message: called with what a child announced.
        output: where children's lines go; None: children write where we do.
    """

    def __init__(
        self,
        *,
        preload: Sequence[str],
        restarts_max: int,
        env: Mapping[str, str],
        on_exit: Callable[[Child], None],
        on_message: Callable[[dict[str, Any]], None],
        output: Output | None = None,
    ) -> None:
        self._restarts_left = restarts_max
        self._on_exit = on_exit
        self._on_message = on_message
        self._output = output
        self._log = logs.get_logger()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["psa_store.launch.forkserver_guard", *preload])
        self._children: list[Child] = []
        self._failures: dict[str, str] = {}
        """By member, the place in training at which its script raised, and what."""
        self._known_failures: set[str] = set()
        self.failure: str | None = None
        """What ended :meth:`run`, if it was a script that failed at the same place again."""
        self._stopping: set[ProcessRole] = set()
        self._signal: int | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="psa-")
        path = Path(self._folder.name) / "supervisor"
        self._socket = listen_announcements(path)
        self._env = {**env, "PSA_SUPERVISOR": str(path)}
        self._wake_receiver, self._wake_sender = socket.socketpair()
        for sock in (self._wake_receiver, self._wake_sender):
            sock.setblocking(False)
        # Until close(), not just until run() returns: a second SIGTERM (`timeout` always sends two) must not interrupt
        # an orderly stop, which would take Redis and ZooKeeper from those who are still leaving.
        self._former = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def spawn(self, role: ProcessRole, target: Callable[..., None], *arguments: Any) -> Child:
        """Start a process that calls ``target(*arguments)``, which must be importable."""
        member = f"{role.value}-{secrets.token_hex(4)}"
        env = {**self._env, "PSA_MEMBER": member}
        taken = {child.number for child in self.alive(role)}
        number = next(free for free in count(1) if free not in taken)
        pipes = self._output.pipes() if self._output is not None else []
        title = f"{role} {number}"
        process = self._context.Process(target=_child_main, args=(title, pipes, env, target, arguments), name=member)
        _start(process)
        output = self._output.follow(f"{role}-{number}", number, pipes) if self._output is not None else Followed()
        child = Child(role, member, process, number, target, arguments, output)
        self._children.append(child)
        return child

    def alive(self, role: ProcessRole) -> list[Child]:
        return [child for child in self._children if child.role is role]

    def run(self, until: Callable[[], bool]) -> int:
        """Watch the children until ``until()`` is true, one fails for good, or SIGTERM or SIGINT comes.

        Returns 0, or the exit code of the child that failed (1 if a signal killed it), or 128 + the signal.
        """
        while self._signal is None and not until():
            failed = self._wait(_TICK_S)
            if failed is not None:
                return failed
        return 0 if self._signal is None else 128 + self._signal

    def stop(self, role: ProcessRole, deadline_s: float) -> int:
        """Ask the children of a role to leave, wait for it, SIGKILL them after the deadline; returns the worst code."""
        self._stopping.add(role)
        leaving = self.alive(role)
        for child in leaving:
            child.process.terminate()
        end_s, waits = time.monotonic() + deadline_s, logs.Waits()
        while left := self.alive(role):
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                for child in left:
                    self._log.warning("does not leave in time: killed", member=child.member)
                    child.process.kill()
                left_s = _TICK_S
            waits.on("leave", f"{names(child.member for child in left)} to leave", f"killed in {left_s:.0f} s if not")
            self._wait(min(left_s, _TICK_S))
        waits.over("leave")
        return max((reported_code(child.exit_code, stopping=True) for child in leaving), default=0)

    def close(self) -> None:
        """Kill what is left and release everything."""
        for child in self._children:
            child.process.kill()
            child.process.join()
        self._children.clear()
        for number, handler in self._former.items():
            signal.signal(number, handler)
        for sock in (self._socket, self._wake_receiver, self._wake_sender):
            sock.close()
        self._folder.cleanup()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._signal == number == signal.SIGINT:
            raise KeyboardInterrupt  # a person asked twice, and does not want to wait
        if self._signal is not None:
            return
        self._signal = number
        self._wake_sender.send(b"\0")

    def _wait(self, timeout_s: float | None) -> int | None:
        """Wait for something to happen and deal with it; the exit code of a child that failed for good, or None."""
        sentinels = {child.process.sentinel: child for child in self._children}
        waited: Iterable[Any] = connection.wait([*sentinels, self._socket, self._wake_receiver], timeout_s)
        failed = None
        self._read_messages()  # before anything is done about a child: they are its last words
        for ready in waited:
            if ready is self._wake_receiver:
                self._wake_receiver.recv(64)
            elif ready is not self._socket:
                code = self._reap(sentinels[ready])
                failed = code if failed is None else failed
        return failed

    def _read_messages(self) -> None:
        while (message := read_announcement(self._socket)) is not None:
            match message:
                case {"event": "failed", "member": str(member), "how": str(how)}:
                    self._failures[member] = how
                case {"member": str()}:
                    self._on_message(message)
                case _:
                    self._log.warning("a message to the supervisor is none of a process of this run: passed over")

    def _reap(self, child: Child) -> int | None:
        child.process.join()
        self._on_exit(child)
        child.output.drain()
        self._children.remove(child)
        failure = self._failures.pop(child.member, None)
        is_new = failure is not None and failure not in self._known_failures
        if failure is not None:
            self._known_failures.add(failure)
        stopping = child.role in self._stopping
        match after_exit(child.exit_code, self._restarts_left, stopping, role=child.role, new_failure=is_new):
            case Verdict.RESTART:
                self._restarts_left -= 1
                again = self.spawn(child.role, child.target, *child.arguments)
                self._log.warning(
                    "a process died: restarting", died=child.member, code=child.exit_code, started=again.member
                )
            case Verdict.FAIL:
                self._log.error("a process failed", member=child.member, code=child.exit_code)
                self.failure = failure
                return reported_code(child.exit_code, stopping=False)
            case Verdict.DONE:
                pass
        return None


def _start(process: BaseProcess) -> None:
    """Have the fork server fork; a new fork server, if it was killed."""
    end_s = time.monotonic() + _START_S
    while True:
        try:
            with _safe_path():
                return process.start()
        except (ConnectionError, EOFError) as error:
            # Its sockets are closed a moment before multiprocessing can see that it is dead, and replace it.
            if time.monotonic() > end_s:
                raise UserCodeFailed(
                    f"process {process.name} cannot be started: the process that forks it ends at once ({error}); "
                    "what it printed stands above"
                ) from error
            time.sleep(_START_AGAIN_S)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keep the current directory off the path of the fork server, which would import what lies there."""
    given = os.environ.get("PYTHONSAFEPATH")
    if not given:
        os.environ["PYTHONSAFEPATH"] = SAFE_PATH
    try:
        yield
    finally:
        if not given:
            del os.environ["PYTHONSAFEPATH"]


def _child_main(
    title: str,
    pipes: Sequence[Pipe],
    env: Mapping[str, str],
    target: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """In the child: die with the fork server (which dies with the supervisor), then do what we are for."""
    die_with_parent(signal.SIGTERM)
    supervisor = multiprocessing.parent_process()
    if supervisor is None or not supervisor.is_alive():
        sys.exit(0)  # it died before the first line could notice
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see forkserver_guard
    # Ctrl-C in a terminal reaches the whole group; the supervisor alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(env)
    redirect(pipes)
    logs.entitle(title)
    try:
        target(*arguments)
    except SystemExit as left:
        # sys.exit(-1) would look like the loss of the fork server, and be tried again and again.
        if isinstance(left.code, int) and left.code & 0xFF == _LOST_EXIT:
            sys.exit(1)
        raise
