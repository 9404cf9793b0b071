"""A server program as a child process: it dies with us, its log is kept, and its end is always waited for.

One process per folder and name, ever: a start waits until the process of an earlier start is gone, even if the process
that started it was killed and the old process is still writing its last bytes.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from psa_store.config.own_files import private_opener, read_secret, write_private
from psa_store.errors import DependencyUnreachable
from psa_store.logs import Waits

_LOG_LINES = 16  # a Java stack trace, and above it the reason
_POLL_S = 0.01
_ANSWER_S = 1.0
_PASSWORD_BYTES = 24
_UTF8 = {"LC_ALL": "C.UTF-8"}
_OURS = "PSA_"
"""Variables that are for psa alone: the key and passwords are among them."""
# Below the ports that Linux gives to outgoing connections: a client that keeps trying the address of a server that
# is down would sooner or later be given that very port, connect to itself, and keep the server from coming back.
_PORTS = range(16384, 32768)
_PORT_ATTEMPTS = 200


class KilledWhileStarting(DependencyUnreachable):
    """A signal ended the program before it served: nothing is known to be wrong with it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server program runs: the address on which it listens, and the command that brings it there."""

    address: str = "127.0.0.1"
    enter: tuple[str, ...] = ()


class ChildServer:
    """One process of another program, with its log in ``folder``. Start it from a thread that lives as long as it."""

    def __init__(self, name: str, folder: Path) -> None:
        self._folder = folder
        self._log = folder / f"{name}.log"
        self._pid_path = folder / f"{name}.pid"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, command: Sequence[str], end_s: float) -> None:
        """Run the program, as soon as the one of an earlier start has ended; ``end_s`` is a monotonic time.

        Its environment is ours without what is meant for psa, and it reads names of files as UTF-8.
        """
        self._wait_for_predecessor(end_s)
        # The kernel ends the child when we die, however we die; setpriv is in util-linux.
        setpriv = shutil.which("setpriv")
        guarded = [setpriv, "--pdeathsig", "TERM", *command] if setpriv else list(command)
        with open(self._log, "ab", opener=private_opener) as log:
            self._process = subprocess.Popen(
                guarded,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={name: value for name, value in os.environ.items() if not name.startswith(_OURS)} | _UTF8,
                start_new_session=True,
                umask=0o077,  # its files and sockets are for this user alone
            )
        write_private(self._pid_path, f"{self.pid} {_started_at(self.pid)}")

    def wait_until(self, serves: Callable[[], bool], end_s: float, what: str) -> None:
        """Wait until the program serves; raises DependencyUnreachable with the end of its log if it does not."""
        waits = Waits()
        while not serves():
            if not self.running or time.monotonic() > end_s:
                killed = self._process is not None and (self._process.poll() or 0) < 0
                self.stop(1.0)
                kind = KilledWhileStarting if killed else DependencyUnreachable
                raise kind(f"{what} in {self._folder} does not start; {self._log} ends with:\n{self._last_words()}")
            waits.on("child", f"{what} in {self._folder} to start")
            time.sleep(_POLL_S)
        waits.over("child")

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        if self._process is not None:
            self._process.terminate()

    def stop(self, deadline_s: float) -> None:
        """SIGTERM, and SIGKILL after the deadline."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def _wait_for_predecessor(self, end_s: float) -> None:
        waits = Waits()
        words = self._pid_path.read_text().split() if self._pid_path.exists() else []
        while len(words) == 2 and _started_at(int(words[0])) == words[1]:
            if time.monotonic() > end_s:
                raise DependencyUnreachable(
                    f"process {words[0]} of an earlier start still uses {self._folder}: wait for it or end it"
                )
            waits.on("predecessor", f"process {words[0]} of an earlier start to end", f"it still uses {self._folder}")
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-_LOG_LINES:])


def find_program(names: Sequence[str], packages: str) -> str:
    """The path of the first program that is installed; raises DependencyUnreachable saying how to get one."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise not_installed(names[0], packages)


def not_installed(what: str, packages: str, otherwise: str = "") -> DependencyUnreachable:
    """The error that says how to get a missing program. ``otherwise``: another way."""
    return DependencyUnreachable(
        f"{what} is not installed: `apt-get install {packages}`, {f'{otherwise}, ' if otherwise else ''}"
        "or set PSA_REDIS and PSA_ZOOKEEPER to servers that run elsewhere"
    )


def answer_of(where: tuple[str, int] | Path, request: bytes) -> bytes:
    """All that a server answers until it ends the connection; nothing if it does not answer."""
    try:
        with _connected(where) as sock:
            sock.sendall(request)
            return b"".join(iter(lambda: sock.recv(8192), b""))
    except OSError:
        return b""


def _connected(where: tuple[str, int] | Path) -> socket.socket:
    if not isinstance(where, Path):
        return socket.create_connection(where, timeout=_ANSWER_S)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(_ANSWER_S)
        sock.connect(str(where))
    except BaseException:
        sock.close()
        raise
    return sock


def remembered_password(path: Path) -> str:
    """The password of an earlier start; a new one the first time. It needs no percent-encoding in an address."""
    if not path.exists():
        write_private(path, secrets.token_urlsafe(_PASSWORD_BYTES))
    return read_secret(path)


def remembered_ports(path: Path, count: int) -> list[int]:
    """The ports of an earlier start, so that addresses survive a restart; free ones the first time."""
    ports = [int(word) for word in path.read_text().split()] if path.exists() else []
    if len(ports) != count:
        ports = _free_ports(count)
        write_private(path, " ".join(map(str, ports)))
    return ports


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, _PORT_ATTEMPTS):
        if len(found) == count:
            return found
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    raise DependencyUnreachable(f"no {count} free ports from {_PORTS.start} to {_PORTS.stop} on 127.0.0.1")


def _started_at(pid: int) -> str | None:
    """When a living process started, in clock ticks since boot; with the pid it names a process for good."""
    try:
        # The name of the program comes before, in parentheses, and may contain anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
