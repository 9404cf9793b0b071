"""Starts processes of the job in milliseconds, on any host: forks them from a process that has imported everything.

The spawner is a process with one thread and one socket to the harness. A request on that socket makes it fork a child,
which begins a session, enters its network namespace, sets its environment and its log, and calls a function. The
answer carries two descriptors: the child itself (a pidfd, so that no signal ever hits a later process with the same
pid) and the end of a pipe, on which the spawner reports how the child ended.

No process outlives the harness: when its end of the socket closes, for whatever reason, the spawner kills its children
and ends; when the spawner dies first, the kernel kills its children.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from chaos.cluster.network import enter
from psa_store.launch.guard import die_with_parent

_ROOT = Path(__file__).parents[2]
_PRELOAD = "psa_store.launch.preload"
_REQUEST_BYTES_MAX = 1 << 17
_REPLY_BYTES_MAX = 64
_REPORT_BYTES_MAX = 16
_REPLY_S = 60.0  # the first one comes when torch has been imported
_END_S = 10.0


class SpawnerDied(Exception):
    """The spawner does not answer. Its children are dead too."""


class Process:
    """A child of the spawner, as the harness sees it. Thread-safe."""

    def __init__(self, name: str, pid: int, pidfd: int, report: int) -> None:
        self.name = name
        self.pid = pid
        self._lock = threading.Lock()
        self._pidfd = pidfd
        self._report = report
        self._exit_code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        with self._lock:
            if self._exit_code is None and _readable(self._report, 0.0):
                text = os.read(self._report, _REPORT_BYTES_MAX)
                # Without a report the spawner has died, and the kernel has killed its children.
                self._exit_code = int(text) if text else -signal.SIGKILL
                os.close(self._report)
                os.close(self._pidfd)
            return self._exit_code

    def wait(self, timeout_s: float) -> int:
        """The exit code, once there is one; raises TimeoutError."""
        with self._lock:
            # A duplicate, because another thread may see the end first and close the original.
            report = os.dup(self._report) if self._exit_code is None else None
        if report is not None:
            try:
                _readable(report, timeout_s)
            finally:
                os.close(report)
        code = self.poll()
        if code is None:
            raise TimeoutError(f"{self.name} (process {self.pid}) still runs after {timeout_s} s")
        return code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def pause(self) -> None:
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Idempotent."""
        self.send_signal(signal.SIGCONT)

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens if it has ended."""
        with self._lock:
            if self._exit_code is None:
                try:
                    signal.pidfd_send_signal(self._pidfd, number)
                except ProcessLookupError:
                    pass


@dataclass(frozen=True, slots=True)
class _Task:
    """What a child does."""

    name: str
    target: str
    arguments: Sequence[object]
    env: Mapping[str, str]
    namespace: str | None


@dataclass(frozen=True, slots=True)
class _Child:
    """A child as the spawner sees it; ``report`` is where its end is reported."""

    pid: int
    pidfd: int
    report: int


class Spawner:
    """A process that forks others, from enter to exit of the context, which ends them all. Thread-safe.

    ``env`` is what its children have in common, beyond the environment of the harness.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = dict(env)
        self._lock = threading.Lock()
        self._processes: list[Process] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(its.fileno())],
                    # A script would have this folder on its path, and in it a `redis` that is not the library.
                    cwd=_ROOT,
                    env={**os.environ, **self._env},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[its.fileno()],
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        ours.settimeout(_REPLY_S)
        self._socket = ours
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._socket is not None and self._process is not None
        self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in self._processes:
            process.wait(_END_S)

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def spawn(
        self,
        name: str,
        target: str,
        arguments: Sequence[object],
        env: Mapping[str, str],
        namespace: str | None,
        log: Path | int,
    ) -> Process:
        """Call a function, "module:function", in a new process; returns when that exists.

        ``arguments`` are its positional ones, as JSON has them; ``env`` adds to the spawner's; ``namespace`` names the
        network namespace; what the process prints is appended to ``log``, a file or a descriptor that is open. It ends
        as a script does: 0 when the function returns, 1 with a traceback when it raises.
        """
        task = _Task(name, target, arguments, dict(env), namespace)
        with self._lock, _opened(log) as output:
            pid, report, pidfd = self._ask(json.dumps(asdict(task)).encode(), output)
            process = Process(name, pid, pidfd, report)
            # The caller need neither keep a process nor ask how it ended: its descriptors are closed here.
            self._processes = [*(each for each in self._processes if each.poll() is None), process]
        return process

    def _ask(self, request: bytes, output: int) -> tuple[int, int, int]:
        assert self._socket is not None and self._process is not None, "not started"
        assert len(request) <= _REQUEST_BYTES_MAX, "too large for one request"
        try:
            socket.send_fds(self._socket, [request], [output])
            reply, fds, _, _ = socket.recv_fds(self._socket, _REPLY_BYTES_MAX, 2, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            self._process.kill()  # an answer that came later would be taken for that of the next request
            raise SpawnerDied(f"the spawner does not answer: {error}") from error
        if not reply:
            raise SpawnerDied("the spawner has ended; its last words are on our standard error")
        report, pidfd = fds
        return int(reply), report, pidfd


@contextmanager
def _opened(log: Path | int) -> Iterator[int]:
    if isinstance(log, int):
        yield log
        return
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _readable(fd: int, timeout_s: float) -> bool:
    """Wait until there is something to read, or the end; select() could not take descriptors beyond 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


# --- In the spawner


def _main(harness: socket.socket) -> None:
    # No thread may start before this: only the one that forks exists in a child. (The pool that OpenBLAS
    # starts with numpy's import is no exception: it is taken down before each fork, by its own handler.)
    importlib.import_module(_PRELOAD)
    # Collecting garbage would write to every page that a child shares with us: half a second at its end alone.
    gc.freeze()
    task = _fork_on_request(harness)
    if task is not None:
        module, _, function = task.target.partition(":")
        getattr(importlib.import_module(module), function)(*task.arguments)


def _fork_on_request(harness: socket.socket) -> _Task | None:
    """Returns in each child, with its task; and in the spawner when the harness is gone, with None.

    So a child ends by returning from the main program, with all that Python does then, as if it had been executed.
    """
    spawner = os.getpid()
    children: dict[int, _Child] = {}
    poll = select.poll()
    poll.register(harness, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != harness.fileno():
                poll.unregister(fd)
                _reap(children.pop(fd))
                continue
            request, output = _receive(harness)
            if not request:
                _end(children.values())
                return None
            task = _Task(**json.loads(request))
            pid = os.fork()
            if pid == 0:
                harness.close()
                for child in children.values():
                    os.close(child.pidfd)
                    os.close(child.report)
                _become(task, spawner, output)
                return task
            os.close(output)
            child = _answer(harness, pid)
            children[child.pidfd] = child
            poll.register(child.pidfd, select.POLLIN)


def _receive(harness: socket.socket) -> tuple[bytes, int]:
    """A request, and where its child prints to; nothing if the harness has ended."""
    try:
        request, fds, _, _ = socket.recv_fds(harness, _REQUEST_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return b"", -1  # with our answers unread
    return request, fds[0] if fds else -1


def _answer(harness: socket.socket, pid: int) -> _Child:
    """Hand a child to the harness."""
    # Only this process waits for it, so the pid is still its own, even if it has ended already.
    pidfd = os.pidfd_open(pid)
    readable, report = os.pipe()
    try:
        socket.send_fds(harness, [str(pid).encode()], [readable, pidfd])
    except ConnectionError:
        pass  # the harness is gone: the next request is its end
    os.close(readable)
    return _Child(pid, pidfd, report)


def _reap(child: _Child) -> None:
    """A child has ended: leave no zombie, and say how it ended."""
    _, status = os.waitpid(child.pid, 0)
    try:
        os.write(child.report, str(os.waitstatus_to_exitcode(status)).encode())
    except BrokenPipeError:
        pass  # the harness is gone
    os.close(child.report)
    os.close(child.pidfd)


def _end(children: Collection[_Child]) -> None:
    for child in children:
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
    for child in children:
        _reap(child)


def _become(task: _Task, spawner: int, output: int) -> None:
    """In a child: take the identity that the task names, before any of its code runs."""
    die_with_parent(signal.SIGKILL)
    if os.getppid() != spawner:
        os._exit(1)  # it died before the kernel was told
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    Path("/proc/self/comm").write_text(task.name)  # for `ps` and `top`
    os.environ.update(task.env)
    if task.namespace is not None:
        enter(task.namespace)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _harness:
        _main(_harness)
