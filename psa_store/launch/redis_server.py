"""A private redis-server: append-only, never evicting, with a password, on a Unix socket of this user alone."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from psa_store.config.own_files import private_folder, short_lived_folder, write_private
from psa_store.launch.child import (
    ChildServer,
    Place,
    answer_of,
    find_program,
    remembered_password,
    remembered_ports,
)

_SOCKET_FOLDER_MAX = 90
_NO_PORT = 0
_OPTIONS = {
    "save": '""',
    "appendonly": "yes",
    "appendfsync": "everysec",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
    "auto-aof-rewrite-min-size": "256mb",
    "rdbcompression": "no",  # weights do not get smaller: 1 GB took 5.6 s of a core to rewrite instead of 1.2
}


class PrivateRedis:
    """One redis-server (or valkey-server) whose data, password and addresses live in ``folder`` and survive restarts.

    ``tcp``: it listens at ``place`` as well as on its socket.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, str] | None = None,
        place: Place | None = None,
        *,
        tcp: bool = False,
    ) -> None:
        self._folder = private_folder(folder.absolute())
        self._place = place or Place()
        given = options or {}
        self._password = given.get("requirepass") or remembered_password(self._folder / "password")
        self._options = {"bind": self._place.address, **_OPTIONS, "requirepass": self._password, **given}
        self._child = ChildServer("redis", self._folder)
        self._port = remembered_ports(self._folder / "port", 1)[0] if tcp else _NO_PORT
        self._socket = self._socket_folder() / "redis.sock"

    @property
    def url(self) -> str:
        """By its Unix socket."""
        return f"unix://:{quote(self._password, safe='')}@{quote(str(self._socket))}"

    @property
    def tcp_url(self) -> str:
        return self.url_at(*self.address)

    def url_at(self, host: str, port: int) -> str:
        """By another address that leads to it, such as a proxy's."""
        return f"redis://:{quote(self._password, safe='')}@{host}:{port}"

    @property
    def address(self) -> tuple[str, int]:
        assert self._port != _NO_PORT, "it was not made with tcp=True"
        return self._place.address, self._port

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.running

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
        if self._socket.parent != self._folder:
            with suppress(OSError):
                self._socket.parent.rmdir()

    def _socket_folder(self) -> Path:
        """Ours, unless the kernel would not take so long a path: then one in the folder for temporary files."""
        if len(str(self._folder)) < _SOCKET_FOLDER_MAX:
            return self._folder
        name = f"psa-{os.geteuid()}-{sha256(str(self._folder).encode()).hexdigest()[:16]}"
        return Path(tempfile.gettempdir()) / name

    def _write_config(self) -> Path:
        if self._socket.parent != self._folder:
            short_lived_folder(self._socket.parent)
        options = {
            **self._options,
            "port": str(self._port),
            "dir": f'"{self._folder}"',
            "unixsocket": f'"{self._socket}"',
            "unixsocketperm": "700",
        }
        path = self._folder / "redis.conf"
        write_private(path, "".join(f"{name} {value}\n" for name, value in options.items()))
        return path

    def _answers(self) -> bool:
        """It answers PING, and it is the process that we started."""
        reply = answer_of(self._socket, f"AUTH {self._password}\r\nPING\r\nINFO server\r\nQUIT\r\n".encode())
        return reply.startswith(b"+OK\r\n+PONG") and f"process_id:{self.pid}\r\n".encode() in reply
