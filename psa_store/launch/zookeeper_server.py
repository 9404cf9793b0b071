"""A private ZooKeeper, one node or an ensemble of three, reachable from this machine only, and open to us alone.

It listens on TCP, which ZooKeeper needs, so any process of the machine reaches it: what is in it, its root included,
belongs to one user whose password lies in ``folder``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from psa_store.config.own_files import private_folder, write_private
from psa_store.coordination import close_to_others
from psa_store.errors import DependencyUnreachable
from psa_store.launch.child import (
    ChildServer,
    Place,
    answer_of,
    find_program,
    not_installed,
    remembered_password,
    remembered_ports,
)

# Debian's jar names what it needs in its manifest, except for a logger, without which failures leave no word.
_CLASSPATHS = {
    Path("/usr/share/java/zookeeper.jar"): "/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar",
    Path("/opt/zookeeper/lib"): "/opt/zookeeper/lib/*",
}
_HOME = "ZOOKEEPER_HOME"
"""An environment variable, as ZooKeeper's own scripts have it: where its tarball was unpacked."""
_PACKAGES = "zookeeper default-jre-headless"
_MAIN = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
_JAVA_OPTIONS = (
    "-Xmx128m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-Xshare:auto",
    "-Dzookeeper.admin.enableServer=false",
    "-Dzookeeper.4lw.commands.whitelist=srvr,conf",  # they tell versions, counts and paths, no contents
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Djava.net.preferIPv4Stack=true",
)
_USER = "psa"
_PORTS_PER_NODE = 3  # clients, followers, elections


class PrivateZooKeeper:
    """ZooKeeper nodes whose data and ports live in ``folder`` and survive restarts."""

    def __init__(self, folder: Path, nodes: int = 1, places: Sequence[Place] | None = None) -> None:
        self._folder = private_folder(folder.absolute())
        self._password = remembered_password(self._folder / "password")
        self._places = places or [Place()] * nodes
        self._ports = remembered_ports(self._folder / "ports", nodes * _PORTS_PER_NODE)
        self._nodes = [ChildServer(f"node{index}", self._folder) for index in range(nodes)]

    @property
    def hosts(self) -> str:
        """As PSA_ZOOKEEPER has them, with user and password."""
        return self.hosts_at(self.addresses)

    def hosts_at(self, addresses: Iterable[tuple[str, int]]) -> str:
        """The same by other addresses that lead to the nodes, such as proxies'."""
        return f"{_USER}:{self._password}@{','.join(f'{address}:{port}' for address, port in addresses)}"

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where each node serves clients."""
        return [(place.address, self._client_port(index)) for index, place in enumerate(self._places)]

    @property
    def pids(self) -> list[int]:
        return [node.pid for node in self._nodes]

    @property
    def running(self) -> bool:
        return all(node.running for node in self._nodes)

    def start(self, deadline_s: float) -> None:
        """Start the nodes that do not run; returns when all serve clients.

        Raises:
            DependencyUnreachable: Java or ZooKeeper is not installed, or a node does not serve in time.
        """
        end_s = time.monotonic() + deadline_s
        for index, node in enumerate(self._nodes):
            if not node.running:
                node.start(self._command(index), end_s)
        for index, node in enumerate(self._nodes):
            node.wait_until(partial(self._serves, index), end_s, "the private ZooKeeper")
        close_to_others(self.hosts, max(1.0, end_s - time.monotonic()))

    def kill(self, node: int = 0) -> None:
        self._nodes[node].kill()

    def stop(self, deadline_s: float = 10.0) -> None:
        for node in self._nodes:
            node.terminate()
        end_s = time.monotonic() + deadline_s
        for node in self._nodes:
            node.stop(max(0.0, end_s - time.monotonic()))

    def _client_port(self, index: int) -> int:
        return self._ports[index * _PORTS_PER_NODE]

    def _data(self, index: int) -> Path:
        return self._folder / f"data{index}"

    def _command(self, index: int) -> list[str]:
        java = find_program(["java"], _PACKAGES)
        return [
            *self._places[index].enter,
            java,
            *_JAVA_OPTIONS,
            "-cp",
            _classpath(),
            _MAIN,
            self._write_config(index).name,
        ]

    def _write_config(self, index: int) -> Path:
        """A file of Java's properties, which are read as ISO 8859-1: so no path in it begins at the root."""
        data = self._data(index)
        private_folder(data)
        lines = [
            "tickTime=500",
            "initLimit=20",
            "syncLimit=10",
            "minSessionTimeout=1000",
            "maxSessionTimeout=120000",
            "maxClientCnxns=0",
            "autopurge.purgeInterval=1",
            f"dataDir={data.name}",
            f"clientPort={self._client_port(index)}",
            f"clientPortAddress={self._places[index].address}",
        ]
        if len(self._nodes) > 1:
            write_private(data / "myid", str(index + 1))
            for other in range(len(self._nodes)):
                _, follow, elect = self._ports[other * _PORTS_PER_NODE : (other + 1) * _PORTS_PER_NODE]
                lines.append(f"server.{other + 1}={self._places[other].address}:{follow}:{elect}")
        path = self._folder / f"node{index}.cfg"
        write_private(path, "\n".join(lines) + "\n")
        return path

    def _serves(self, index: int) -> bool:
        """A node that serves (alone, or in a quorum) tells its configuration, which shows that it is ours."""
        return b"dataDir=%b/" % os.fsencode(self._data(index)) in answer_of(self.addresses[index], b"conf")


def _classpath() -> str:
    """Of the ZooKeeper that is named, else of one that is installed.

    Raises:
        DependencyUnreachable: there is none.
    """
    named = os.environ.get(_HOME)
    if named:
        jars = Path(named).absolute() / "lib"
        if not any(jars.glob("zookeeper*.jar")):
            raise DependencyUnreachable(f"{_HOME}={named!r}: no {jars}/zookeeper*.jar: name a folder of its tarball")
        return f"{jars}/*"
    found = next((value for path, value in _CLASSPATHS.items() if path.exists()), None)
    if found is None:
        raise not_installed("ZooKeeper", _PACKAGES, f"or unpack its tarball and set {_HOME} to it")
    return found
