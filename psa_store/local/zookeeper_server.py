"""A private ZooKeeper, one node or an ensemble of three, reachable from this machine only."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from psa_store.errors import DependencyUnreachable
from psa_store.local.child import ChildServer, find_program, remembered_ports

_JARS = (Path("/usr/share/java/zookeeper.jar"), Path("/opt/zookeeper/lib"))
_INSTALL = "zookeeper default-jre-headless"
_JAVA_OPTIONS = (
    "-Xmx128m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Xshare:auto",
    "-Dzookeeper.admin.enableServer=false",
    "-Dzookeeper.4lw.commands.whitelist=ruok,srvr",
    "-Djava.net.preferIPv4Stack=true",
)
_POLL_S = 0.02
_PORTS_PER_NODE = 3  # clients, followers, elections


class PrivateZooKeeper:
    """ZooKeeper nodes whose data and ports live in ``folder`` and survive restarts."""

    def __init__(self, folder: Path, nodes: int = 1) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._ports = remembered_ports(folder / "ports", nodes * _PORTS_PER_NODE)
        self._nodes = [ChildServer(f"node{index}", folder) for index in range(nodes)]

    @property
    def hosts(self) -> str:
        return ",".join(f"127.0.0.1:{self._client_port(index)}" for index in range(len(self._nodes)))

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
        java = find_program(["java"], _INSTALL)
        jars = next((path for path in _JARS if path.exists()), None)
        if jars is None:
            raise DependencyUnreachable(f"ZooKeeper is not installed: `apt-get install {_INSTALL}`")
        for index, node in enumerate(self._nodes):
            if not node.running:
                node.start(self._command(java, jars, index), self._folder)
        end_s = time.monotonic() + deadline_s
        for index, node in enumerate(self._nodes):
            while not self._serves(index):
                if not node.running or time.monotonic() > end_s:
                    words = node.last_words()
                    self.stop(1.0)
                    raise DependencyUnreachable(f"the private ZooKeeper in {self._folder} does not start:\n{words}")
                time.sleep(_POLL_S)

    def kill(self, node: int = 0) -> None:
        self._nodes[node].kill()

    def stop(self, deadline_s: float = 10.0) -> None:
        for node in self._nodes:
            node.stop(deadline_s)

    def _client_port(self, index: int) -> int:
        return self._ports[index * _PORTS_PER_NODE]

    def _command(self, java: str, jars: Path, index: int) -> list[str]:
        data = self._folder / f"data{index}"
        data.mkdir(exist_ok=True)
        lines = [
            "tickTime=500",
            "initLimit=20",
            "syncLimit=10",
            "minSessionTimeout=1000",
            "maxSessionTimeout=120000",
            "maxClientCnxns=0",
            "autopurge.purgeInterval=1",
            f"dataDir={data}",
            f"clientPort={self._client_port(index)}",
            "clientPortAddress=127.0.0.1",
        ]
        if len(self._nodes) > 1:
            (data / "myid").write_text(str(index + 1))
            for other in range(len(self._nodes)):
                _, follow, elect = self._ports[other * _PORTS_PER_NODE : (other + 1) * _PORTS_PER_NODE]
                lines.append(f"server.{other + 1}=127.0.0.1:{follow}:{elect}")
        config = self._folder / f"node{index}.cfg"
        config.write_text("\n".join(lines) + "\n")
        classpath = str(jars) if jars.suffix == ".jar" else f"{jars}/*"
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        return [java, *_JAVA_OPTIONS, "-cp", classpath, main, str(config)]

    def _serves(self, index: int) -> bool:
        """A node answers `srvr` with its mode once it is standalone, or in a quorum."""
        try:
            with socket.create_connection(("127.0.0.1", self._client_port(index)), timeout=1.0) as sock:
                sock.sendall(b"srvr")
                reply = b""
                while part := sock.recv(4096):
                    reply += part
                return b"Mode:" in reply
        except OSError:
            return False
