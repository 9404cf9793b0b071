"""Redis servers that fail over, for the tests: a master with replicas, and the Sentinels that watch them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from psa_store.launch import PrivateRedis
from psa_store.launch.child import remembered_ports
from tests.harness import PATIENCE_S

PASSWORD, SENTINEL_PASSWORD = "open", "barley"
NAME = "weights"
_DOWN_AFTER_MS, _FAILOVER_TIMEOUT_MS = 2000, 6000


def eventually(found: Callable[[], Any]) -> Any:
    """Ask until the answer is true, which nothing announces; errors of a server that is away are no answer."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        with suppress(redis.exceptions.RedisError):
            answer = found()
            if answer:
                return answer
        time.sleep(0.05)  # Redis and its Sentinels send no event of what is asked here
    raise AssertionError("it did not come true")


def replicated(folder: Path, replicas: int, link: Callable[[tuple[str, int]], int] | None = None) -> list[PrivateRedis]:
    """A master and its replicas, started and in step.

    ``link``: starts what the replicas reach the master by, and returns its port.
    """
    options = {"requirepass": PASSWORD, "masterauth": PASSWORD, "repl-diskless-sync-delay": "0"}
    master = PrivateRedis(folder / "redis-0", options, tcp=True)
    master.start(120)
    host, port = master.address
    following = {**options, "replicaof": f"{host} {link(master.address) if link else port}"}
    servers = [master, *(PrivateRedis(folder / f"redis-{i + 1}", following, tcp=True) for i in range(replicas))]
    for server in servers:
        server.start(120)
    for replica in servers[1:]:
        eventually(lambda: told(replica).info("replication")["master_link_status"] == "up")  # noqa: B023
    return servers


def told(server: PrivateRedis) -> Any:
    """A client of one server."""
    return redis.Redis.from_url(server.tcp_url)


class Sentinels:
    """Three Sentinels that watch a master, with a password of their own."""

    def __init__(self, folder: Path, master: PrivateRedis) -> None:
        folder.mkdir()
        self.ports = remembered_ports(folder / "ports", 3)
        self._processes = [self._start(folder / str(port), port, master) for port in self.ports]
        for port in self.ports:
            # Each must know both others and the replicas, or there is no majority and no replica to promote.
            eventually(lambda: self._state(port)["num-other-sentinels"] == 2)  # noqa: B023
            eventually(lambda: self._state(port)["num-slaves"] == 2)  # noqa: B023

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis+sentinel://:{PASSWORD}@{hosts}/{NAME}/0?sentinel_password={SENTINEL_PASSWORD}"

    def master_port(self) -> int:
        """What most of them say."""
        said = []
        for port in self.ports:
            with suppress(redis.exceptions.RedisError):
                said.append(int(self._state(port)["port"]))
        return max(set(said), key=said.count)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _state(self, port: int) -> Any:
        with redis.Redis(port=port, password=SENTINEL_PASSWORD) as client:
            return client.execute_command("SENTINEL MASTER", NAME)

    def _start(self, folder: Path, port: int, master: PrivateRedis) -> subprocess.Popen[bytes]:
        folder.mkdir()
        return started_sentinel(folder, self.configuration(port, folder, master))

    @staticmethod
    def configuration(port: int, folder: Path, master: PrivateRedis) -> list[str]:
        """Of a Sentinel that watches this master."""
        host, master_port = master.address
        return [
            f"port {port}",
            f"dir {folder}",
            f"requirepass {SENTINEL_PASSWORD}",
            f"sentinel sentinel-pass {SENTINEL_PASSWORD}",
            f"sentinel monitor {NAME} {host} {master_port} 2",
            f"sentinel auth-pass {NAME} {PASSWORD}",
            f"sentinel down-after-milliseconds {NAME} {_DOWN_AFTER_MS}",
            f"sentinel failover-timeout {NAME} {_FAILOVER_TIMEOUT_MS}",
        ]


def started_sentinel(folder: Path, lines: list[str]) -> subprocess.Popen[bytes]:
    """One Sentinel with this configuration."""
    config = folder / "sentinel.conf"
    config.write_text("\n".join(lines))
    command = ["setpriv", "--pdeathsig", "TERM", "redis-server", str(config), "--sentinel"]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)
