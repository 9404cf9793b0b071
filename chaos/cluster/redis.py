"""One Redis that can be killed, paused and emptied, and whose disk can be filled."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

from chaos.cluster.network import Host
from chaos.cluster.zookeeper import place_on
from psa_store.launch import PrivateRedis

_START_S = 60.0
_FILLER_BYTES = 1 << 16


class RedisNode:
    """Append-only as the private Redis of `psa run`.

    ``disk_mb``: its data lie on a file system of that size (root only), which is gone after :meth:`close`.
    """

    def __init__(self, folder: Path, host: Host, disk_mb: int | None = None) -> None:
        self._folder = folder
        self._filler = folder / "filler"
        self._mounted = False
        folder.mkdir(parents=True, exist_ok=True)
        if disk_mb is not None:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk_mb}m", "none", str(folder)], check=True)
            self._mounted = True
        options = {}
        if disk_mb is None:
            # The checker requires that what Redis acknowledged is durable. (With this, a full disk ends Redis.)
            options["appendfsync"] = "always"
        self._server = PrivateRedis(folder, options, place_on(host), tcp=True)
        self._by_socket = host.namespace is None

    @property
    def url(self) -> str:
        return self._server.url if self._by_socket else self._server.tcp_url

    def url_at(self, host: str, port: int) -> str:
        """By another address that leads to it."""
        return self._server.url_at(host, port)

    @property
    def address(self) -> tuple[str, int]:
        return self._server.address

    @property
    def pid(self) -> int:
        return self._server.pid

    def start(self) -> None:
        """Start it unless it runs; returns when it answers."""
        self._server.start(_START_S)

    def kill(self) -> None:
        self._server.kill()

    def resume(self) -> None:
        """Idempotent."""
        try:
            os.kill(self.pid, signal.SIGCONT)
        except ProcessLookupError:
            pass

    def fill_disk(self) -> int:
        """Write until nothing more fits; returns the bytes written."""
        written = 0
        with self._filler.open("wb", buffering=0) as file:
            for block in (_FILLER_BYTES, 1):
                try:
                    while True:
                        written += file.write(b"x" * block)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        return written

    def free_disk(self) -> None:
        """Idempotent."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        self.free_disk()
        self.resume()
        self._server.stop()
        if self._mounted:
            subprocess.run(["umount", str(self._folder)], check=True)
