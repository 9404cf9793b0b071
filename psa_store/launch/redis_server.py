"""A private redis-server: append-only, never evicting, reachable from this machine only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from psa_store.launch.child import ChildServer, Place, answer_of, find_program, remembered_ports

_SOCKET_PATH_MAX = 100
_OPTIONS = {
    "save": '""',
    "appendonly": "yes",
    "appendfsync": "everysec",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
    "protected-mode": "yes",
    "auto-aof-rewrite-min-size": "256mb",
    "rdbcompression": "no",  # weights do not get smaller: 1 GB took 5.6 s of a core to rewrite instead of 1.2
}


class PrivateRedis:
    """One redis-server (or valkey-server) whose data, port and socket live in ``folder`` and survive restarts."""

    def __init__(self, folder: Path, options: Mapping[str, str] | None = None, place: Place | None = None) -> None:
        self._folder = folder.absolute()
        self._place = place or Place()
        self._options = {"bind": self._place.address, **_OPTIONS, **(options or {})}
        self._folder.mkdir(parents=True, exist_ok=True)
        self._child = ChildServer("redis", self._folder)
        (self._port,) = remembered_ports(self._folder / "port", 1)
        self._socket = self._folder / "redis.sock"

    @property
    def url(self) -> str:
        """The Unix socket, unless its path is too long for the kernel."""
        return f"unix://{quote(str(self._socket))}" if self._has_socket else self.tcp_url

    @property
    def tcp_url(self) -> str:
        return f"redis://{self._place.address}:{self._port}"

    @property
    def address(self) -> tuple[str, int]:
        return self._place.address, self._port

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
        """Start it unless it runs; returns when it answers, with all its data loaded.

        Raises:
            DependencyUnreachable: it is not installed, or does not answer in time; with the end of its log.
        """
        end_s = time.monotonic() + deadline_s
        if not self.running:
            program = find_program(["redis-server", "valkey-server"], "redis-server")
            self._child.start([*self._place.enter, program, str(self._write_config())], end_s)
        self._child.wait_until(self._answers, end_s, "the private Redis")

    def kill(self) -> None:
        self._child.kill()

    def stop(self, deadline_s: float = 10.0) -> None:
        self._child.stop(deadline_s)

    def _write_config(self) -> Path:
        options = {**self._options, "port": str(self._port), "dir": f'"{self._folder}"'}
        if self._has_socket:
            options["unixsocket"] = f'"{self._socket}"'
        path = self._folder / "redis.conf"
        path.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        return path

    def _answers(self) -> bool:
        """It answers PING, and it is ours: another program may have taken the port while we were down."""
        reply = answer_of(self.address, b"PING\r\nINFO server\r\nQUIT\r\n")
        if reply.startswith(b"-NOAUTH"):  # with a password it says no more than that
            return self.running
        return reply.startswith(b"+PONG") and f"process_id:{self.pid}\r\n".encode() in reply
