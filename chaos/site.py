"""The site of one or many runs: ZooKeeper, Redis, the proxies or network before them, and how to repair it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from chaos.cluster.network import LOOPBACK, Host, Network
from chaos.cluster.redis import RedisNode
from chaos.cluster.spawner import Spawner
from chaos.cluster.zookeeper import ZooKeeperEnsemble
from chaos.proxy import Proxy
from chaos.scenarios import Scenario, Shape
from psa_store.checkpoint.reader import open_version
from psa_store.storage import RedisStore

ZOOKEEPER_NODES = 3
WORKERS = 3
SERVERS_SUPERVISED = 2
SERVERS_HOSTED = 3
SESSION_TIMEOUT_S = 4.0
_ANSWER_S = 10.0
_SMALL_DISK_MB = 64


@dataclass(frozen=True, slots=True)
class Site:
    """What a job runs on, and what faults are injected into."""

    shape: Shape
    redis: RedisNode
    zookeeper: ZooKeeperEnsemble
    spawner: Spawner
    network: Network | None
    redis_proxy: Proxy | None
    zookeeper_proxies: tuple[Proxy, ...]

    @property
    def redis_url(self) -> str:
        """The address of Redis for the job."""
        return self.redis.url if self.redis_proxy is None else self.redis.url_at("127.0.0.1", self.redis_proxy.port)

    @property
    def zookeeper_hosts(self) -> str:
        """The addresses of ZooKeeper for the job."""
        if not self.zookeeper_proxies:
            return self.zookeeper.hosts
        return self.zookeeper.hosts_at([("127.0.0.1", proxy.port) for proxy in self.zookeeper_proxies])

    def host(self, name: str) -> Host:
        """Return the host of a process of the job: this machine, unless each has its own."""
        return LOOPBACK if self.network is None else self.network.host(name)

    def digest(self, job: str, version: int) -> str:
        """Return the sha256 of all parameters and optimizer state of a version, read from Redis."""
        with closing(RedisStore(self.redis.url, timeout_s=_ANSWER_S)) as store:
            return open_version(store, job, version).digest()

    def delete_jobs(self) -> None:
        """Empty Redis, so that runs do not add up there."""
        with Redis.from_url(self.redis.url, socket_timeout=_ANSWER_S) as client:
            client.flushall()

    def repair(self) -> None:
        """Undo all faults and start what is down. Called before every run."""
        if self.network is not None:
            self.network.heal()
        for proxy in (self.redis_proxy, *self.zookeeper_proxies):
            if proxy is not None:
                proxy.pass_all()
        self.redis.resume()
        self.redis.start()
        for node in range(ZOOKEEPER_NODES):
            self.zookeeper.resume(node)
        self.zookeeper.start()


@contextmanager
def open_site(scenario: Scenario, folder: Path) -> Iterator[Site]:
    """Start everything but the job; end it all afterwards."""
    shutil.rmtree(folder, ignore_errors=True)  # data of an earlier campaign
    folder.mkdir(parents=True)
    hosted, proxied = scenario.shape is Shape.HOSTS, scenario.shape is Shape.PROXIED
    with ExitStack() as stack:
        spawner = stack.enter_context(Spawner({}))
        network = stack.enter_context(Network(_host_names())) if hosted else None
        at = (lambda name: LOOPBACK) if network is None else network.host
        zookeeper = stack.enter_context(
            closing(ZooKeeperEnsemble(folder / "zookeeper", [at(f"zk{index}") for index in range(ZOOKEEPER_NODES)]))
        )
        redis = stack.enter_context(
            closing(RedisNode(folder / "redis", at("redis"), disk_mb=_SMALL_DISK_MB if scenario.small_disk else None))
        )
        redis.start()
        zookeeper.start()
        redis_proxy = None
        zookeeper_proxies: list[Proxy] = []
        if proxied:
            redis_proxy = stack.enter_context(closing(Proxy(redis.address)))
            zookeeper_proxies = [stack.enter_context(closing(Proxy(address))) for address in zookeeper.addresses]
        yield Site(scenario.shape, redis, zookeeper, spawner, network, redis_proxy, tuple(zookeeper_proxies))


def _host_names() -> list[str]:
    return [
        *(f"zk{index}" for index in range(ZOOKEEPER_NODES)),
        "redis",
        *(f"server{index}" for index in range(SERVERS_HOSTED)),
        *(f"worker{index}" for index in range(WORKERS)),
    ]
