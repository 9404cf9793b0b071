"""A server program as a child process: it dies with us, its log is kept, and its end is always waited for."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from psa_store.errors import DependencyUnreachable

_LOG_LINES = 8


class ChildServer:
    """One process of another program, with its log in ``folder``. Start it from a thread that lives as long as it."""

    def __init__(self, name: str, folder: Path) -> None:
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, command: Sequence[str], folder: Path) -> None:
        # The kernel ends the child when we die, however we die; setpriv is in util-linux.
        setpriv = shutil.which("setpriv")
        guarded = [setpriv, "--pdeathsig", "TERM", *command] if setpriv else list(command)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                guarded, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self, deadline_s: float) -> None:
        """SIGTERM, and SIGKILL after the deadline."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def last_words(self) -> str:
        """The end of the log, for an error message."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-_LOG_LINES:])


def find_program(names: Sequence[str], package: str) -> str:
    """The path of the first program that is installed; raises DependencyUnreachable saying how to get one."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise DependencyUnreachable(
        f"{names[0]} is not installed: `apt-get install {package}`, "
        "or set PSA_REDIS and PSA_ZOOKEEPER to servers that run elsewhere"
    )


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def remembered_ports(path: Path, count: int) -> list[int]:
    """The ports of an earlier start, so that addresses survive a restart; new ones the first time."""
    if path.exists():
        return [int(word) for word in path.read_text().split()]
    ports: list[int] = []
    while len(ports) < count:
        port = free_port()
        if port not in ports:
            ports.append(port)
    path.write_text(" ".join(map(str, ports)))
    return ports
