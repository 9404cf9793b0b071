"""Measures, about every second, what could leak: memory, descriptors and threads of processes, keys, znodes."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import redis

from chaos.cluster.zookeeper import ZooKeeperEnsemble
from chaos.site import ZOOKEEPER_NODES, Site
from chaos.tail import Tail
from psa_store.testing.journal import Journal

_EVERY_S = 1.0
_ROLES = ("worker", "server")
_MB = 1 << 20


class Sampler:
    """Owns a thread, until :meth:`close`."""

    def __init__(self, journal: Journal, site: Site, journals: Path) -> None:
        self._journal = journal
        self._site = site
        self._tail = Tail(journals)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-sampler")
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._tail.look()
            for role in _ROLES:
                for process in self._tail.living(role):
                    self._process(role, process.pid, process.name)
            self._process("redis", self._site.redis.pid, "redis")
            for node in range(ZOOKEEPER_NODES):
                self._process("zookeeper", self._site.zookeeper.pid(node), f"zk{node}")
            self._data(self._site.zookeeper)

    def _process(self, role: str, pid: int, name: str) -> None:
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                rss_mb = process.memory_info().rss / _MB
                fds, threads = process.num_fds(), process.num_threads()
        except psutil.Error:
            return
        self._journal.record("sample", role=role, pid=pid, name=name, rss_mb=round(rss_mb, 1), fds=fds, threads=threads)

    def _data(self, zookeeper: ZooKeeperEnsemble) -> None:
        """Record what is stored; nothing while it cannot be reached, which is no leak."""
        try:
            with redis.Redis.from_url(self._site.redis.url, socket_timeout=_EVERY_S) as client:
                used_mb = int(client.info("memory")["used_memory"]) / _MB
                self._journal.record("sample", role="redis-data", keys=client.dbsize(), used_mb=round(used_mb, 1))
        except redis.exceptions.RedisError:
            pass
        try:
            self._journal.record("sample", role="zookeeper-data", znodes=zookeeper.znodes())
        except Exception:  # no node serves at this moment
            pass
