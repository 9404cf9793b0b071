"""Three ZooKeeper nodes, each of which can be killed, paused and emptied."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from chaos.cluster.network import Host
from psa_store.launch import Place, PrivateZooKeeper

_START_S = 60.0
_ANSWER_S = 0.5


class NoLeader(Exception):
    """There is no leader: no quorum, or an election is going on."""


class ZooKeeperEnsemble:
    """One node per host. Data survive :meth:`kill` and :meth:`start`, but not :meth:`wipe`."""

    def __init__(self, folder: Path, hosts: Sequence[Host]) -> None:
        self._folder = folder
        places = [place_on(host) for host in hosts]
        self._servers = PrivateZooKeeper(folder, len(hosts), places)

    @property
    def hosts(self) -> str:
        """The addresses as PSA_ZOOKEEPER takes them."""
        return self._servers.hosts

    def hosts_at(self, addresses: Sequence[tuple[str, int]]) -> str:
        """The same by other addresses that lead to the nodes."""
        return self._servers.hosts_at(addresses)

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return self._servers.addresses

    def start(self) -> None:
        """Start the nodes that do not run; returns when all serve."""
        self._servers.start(_START_S)

    def pid(self, node: int) -> int:
        return self._servers.pids[node]

    def kill(self, node: int) -> None:
        self._servers.kill(node)

    def resume(self, node: int) -> None:
        """Idempotent."""
        try:
            os.kill(self.pid(node), signal.SIGCONT)
        except ProcessLookupError:
            pass

    def wipe(self) -> None:
        """Kill all nodes and delete their data; :meth:`start` begins with nothing."""
        for node in range(len(self.addresses)):
            self.kill(node)
        for data in self._folder.glob("data*"):
            shutil.rmtree(data)

    def leader(self) -> int:
        """Return the leader; raise NoLeader."""
        for node in range(len(self.addresses)):
            if self._facts(node).get("Mode") == "leader":
                return node
        raise NoLeader

    def znodes(self) -> int:
        """Return the number of znodes; raise NoLeader if no node answers."""
        for node in range(len(self.addresses)):
            count = self._facts(node).get("Node count")
            if count is not None:
                return int(count)
        raise NoLeader

    def close(self) -> None:
        for node in range(len(self.addresses)):
            if self._servers.pids:
                self.resume(node)
        self._servers.stop()

    def _facts(self, node: int) -> dict[str, str]:
        """Return what a node reports of itself; nothing if it does not answer or does not serve."""
        try:
            with socket.create_connection(self.addresses[node], timeout=_ANSWER_S) as sock:
                sock.sendall(b"srvr")
                reply = b"".join(iter(lambda: sock.recv(4096), b"")).decode()
        except OSError:
            return {}
        return dict(line.split(": ", 1) for line in reply.splitlines() if ": " in line)


def place_on(host: Host) -> Place:
    """Return how a server program is started on a host."""
    enter = () if host.namespace is None else ("ip", "netns", "exec", host.namespace)
    return Place(host.address, enter)
