"""A private redis-server: append-only, never evicting, reachable from this machine only."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from psa_store.errors import DependencyUnreachable
from psa_store.local.child import ChildServer, find_program, remembered_ports

_SOCKET_PATH_MAX = 100
_POLL_S = 0.01
_OPTIONS = {
    "bind": "127.0.0.1",
    "save": '""',
    "appendonly": "yes",
    "appendfsync": "everysec",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
    "protected-mode": "yes",
    "auto-aof-rewrite-min-size": "256mb",
}


class PrivateRedis:
    """One redis-server (or valkey-server) whose data, port and socket live in ``folder`` and survive restarts."""

    def __init__(self, folder: Path, options: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._options = {**_OPTIONS, **(options or {})}
        folder.mkdir(parents=True, exist_ok=True)
        self._child = ChildServer("redis", folder)
        (self._port,) = remembered_ports(folder / "port", 1)
        self._socket = folder / "redis.sock"

    @property
    def url(self) -> str:
        """The Unix socket, unless its path is too long for the kernel."""
        return f"unix://{self._socket}" if self._has_socket else self.tcp_url

    @property
    def tcp_url(self) -> str:
        return f"redis://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.running

    @property
    def _has_socket(self) -> bool:
        return len(str(self._socket)) < _SOCKET_PATH_MAX

    def start(self, deadline_s: float) -> None:
        """Start it unless it runs; returns when it answers.

        Raises:
            DependencyUnreachable: it is not installed, or does not answer in time; with the end of its log.
        """
        if not self.running:
            program = find_program(["redis-server", "valkey-server"], "redis-server")
            options = {**self._options, "port": str(self._port), "dir": str(self._folder)}
            if self._has_socket:
                options["unixsocket"] = str(self._socket)
            config = self._folder / "redis.conf"
            config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
            self._child.start([program, str(config)], self._folder)
        end_s = time.monotonic() + deadline_s
        while not self._answers():
            if not self.running or time.monotonic() > end_s:
                self._child.stop(1.0)
                raise DependencyUnreachable(
                    f"the private Redis in {self._folder} does not start:\n{self._child.last_words()}"
                )
            time.sleep(_POLL_S)

    def kill(self) -> None:
        self._child.kill()

    def stop(self, deadline_s: float = 10.0) -> None:
        self._child.stop(deadline_s)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1.0) as sock:
                sock.sendall(b"PING\r\n")
                return sock.recv(64).startswith((b"+PONG", b"-NOAUTH"))  # it serves, or would with a password
        except OSError:
            return False
