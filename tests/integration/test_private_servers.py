"""Private servers and `psa up`: what they start answers, what dies comes back, nothing stays behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client

from chaos.neighbour import plain_client
from psa_store.config import running
from psa_store.config.private_servers import hold_home
from psa_store.errors import DependencyUnreachable, UsageError
from psa_store.launch import (
    PrivateRedis,
    PrivateZooKeeper,
    down,
    up,
)
from tests.integration.processes import GONE_S, PATIENCE_S, ends_within, python, read_line


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for something that gives no event, such as a file that another process writes."""
    pause, end_s = threading.Event(), time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end_s, "it did not happen in time"
        pause.wait(0.02)


class TestRedis:
    @pytest.fixture
    def redis(self, tmp_path: Path) -> Iterator[PrivateRedis]:
        server = PrivateRedis(tmp_path / "redis")
        server.start(PATIENCE_S)
        yield server
        server.stop()

    def test_it_is_append_only_and_never_evicts(self, redis: PrivateRedis) -> None:
        with redis_client.Redis.from_url(redis.url, decode_responses=True) as client:
            found = client.config_get("*")
        wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}
        assert {key: found[key] for key in wanted} == wanted

    def test_options_are_added(self, tmp_path: Path) -> None:
        server = PrivateRedis(tmp_path / "redis", {"appendfsync": "always"})
        server.start(PATIENCE_S)
        try:
            with redis_client.Redis.from_url(server.url, decode_responses=True) as client:
                assert client.config_get("appendfsync") == {"appendfsync": "always"}
        finally:
            server.stop()

    @pytest.mark.parametrize("end", [PrivateRedis.stop, PrivateRedis.kill])
    def test_data_address_and_password_survive(
        self, redis: PrivateRedis, tmp_path: Path, end: Callable[[PrivateRedis], None]
    ) -> None:
        address, pid = redis.url, redis.pid
        with redis_client.Redis.from_url(redis.url) as client:
            client.set("key", "value")
        with ends_within(GONE_S, pid):
            end(redis)
        assert not redis.running
        again = PrivateRedis(tmp_path / "redis")
        again.start(PATIENCE_S)
        try:
            assert again.url == address
            assert again.pid != pid
            with redis_client.Redis.from_url(again.url) as client:
                assert client.get("key") == b"value"
        finally:
            again.stop()

    def test_starting_twice_starts_once(self, redis: PrivateRedis) -> None:
        pid = redis.pid
        redis.start(PATIENCE_S)
        assert redis.pid == pid

    def test_a_relative_folder_with_a_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        server = PrivateRedis(Path("my data"))
        server.start(PATIENCE_S)
        try:
            monkeypatch.chdir("/")
            with redis_client.Redis.from_url(server.url) as client:
                assert client.ping()
        finally:
            server.stop()

    def test_a_path_too_long_for_a_socket_has_it_in_a_short_lived_folder_of_this_user_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        server = PrivateRedis(tmp_path / ("long" * 30))
        server.start(PATIENCE_S)
        (folder,) = tmp_path.glob("psa-*")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with redis_client.Redis.from_url(server.url) as client:
            assert client.ping()
        server.stop()
        assert not folder.exists()
        folder.mkdir(mode=0o755)
        with pytest.raises(UsageError, match=f"{folder} is not ours alone"):
            server.start(PATIENCE_S)

    def test_by_tcp_only_on_request(self, redis: PrivateRedis, tmp_path: Path) -> None:
        with redis_client.Redis.from_url(redis.url, decode_responses=True) as client:
            assert client.config_get("port") == {"port": "0"}
        asked = PrivateRedis(tmp_path / "asked", tcp=True)
        asked.start(PATIENCE_S)
        try:
            with redis_client.Redis.from_url(asked.tcp_url) as client:
                assert client.ping()
            other = tmp_path / "other"
            other.mkdir()
            (other / "port").write_text(str(asked.address[1]))
            with pytest.raises(DependencyUnreachable, match="Address already in use"):
                PrivateRedis(other, tcp=True).start(PATIENCE_S)
        finally:
            asked.stop()

    def test_it_waits_for_the_process_of_an_earlier_start(self, redis: PrivateRedis, tmp_path: Path) -> None:
        again = PrivateRedis(tmp_path / "redis")
        with pytest.raises(DependencyUnreachable, match=f"process {redis.pid} of an earlier start"):
            again.start(0.2)
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(redis.stop)
            again.start(PATIENCE_S)  # in the main thread: the child dies with the thread that started it
            stopping.result()
        assert again.running
        again.stop()

    def test_it_dies_with_its_owner(self, tmp_path: Path) -> None:
        owner = python(
            "import sys, pathlib, signal; from psa_store.launch import PrivateRedis\n"
            "server = PrivateRedis(pathlib.Path(sys.argv[1])); server.start(120); print(server.pid, flush=True)\n"
            "signal.pause()",
            tmp_path,
        )
        with owner, ends_within(GONE_S, int(read_line(owner))):
            owner.kill()


class TestZooKeeper:
    def test_data_and_ports_survive_a_stop_and_a_kill(self, tmp_path: Path) -> None:
        server = PrivateZooKeeper(tmp_path)
        hosts = server.hosts
        try:
            server.start(PATIENCE_S)
            with self.client(hosts) as client:
                client.create("/node", b"value")
            for end in (PrivateZooKeeper.stop, PrivateZooKeeper.kill):
                with ends_within(GONE_S, *server.pids):
                    end(server)
                server = PrivateZooKeeper(tmp_path)
                assert server.hosts == hosts
                server.start(PATIENCE_S)
                with self.client(hosts) as client:
                    assert client.get("/node")[0] == b"value"
        finally:
            server.stop()

    def test_an_ensemble_goes_on_without_one_node_and_takes_it_back(self, tmp_path: Path) -> None:
        server = PrivateZooKeeper(tmp_path, nodes=3)
        try:
            server.start(PATIENCE_S)
            pids = server.pids
            server.kill(1)
            with self.client(server.hosts) as client:
                client.create("/node")
            server.start(PATIENCE_S)
            assert [old == new for old, new in zip(pids, server.pids, strict=True)] == [True, False, True]
        finally:
            server.stop()

    def test_a_stranger_on_its_port_is_not_taken_for_it(self, tmp_path: Path) -> None:
        server = PrivateZooKeeper(tmp_path / "one")
        other = tmp_path / "other"
        other.mkdir()
        (other / "ports").write_text((tmp_path / "one" / "ports").read_text())
        server.start(PATIENCE_S)
        try:
            with pytest.raises(DependencyUnreachable, match="Address already in use"):
                PrivateZooKeeper(other).start(PATIENCE_S)
        finally:
            server.stop()

    @staticmethod
    @contextlib.contextmanager
    def client(hosts: str) -> Iterator[Any]:
        client = plain_client(hosts)
        client.start(timeout=PATIENCE_S)
        try:
            yield client
        finally:
            client.stop()
            client.close()


@pytest.mark.parametrize("make", [PrivateRedis, PrivateZooKeeper])
def test_a_missing_program_is_named_with_how_to_get_it(
    make: type[PrivateRedis | PrivateZooKeeper], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DependencyUnreachable, match=r"not installed: `apt-get install .*PSA_REDIS and PSA_ZOOKEEPER"):
        server.start(1.0)


class TestUpAndDown:
    @pytest.fixture
    def home(self, tmp_path: Path) -> Iterator[Path]:
        yield tmp_path / "home"
        down(tmp_path / "home")

    @staticmethod
    def pid(home: Path, name: str) -> int:
        return int((home / name).read_text().split()[0])

    def pids(self, home: Path) -> list[int]:
        return [self.pid(home, name) for name in ("up.pid", "redis/redis.pid", "zookeeper-1/node0.pid")]

    def test_up_starts_and_down_stops_and_data_stay(self, home: Path) -> None:
        assert running(home) is None
        assert not down(home)
        first = up(home, 1)
        assert running(home) == first == up(home, 1)
        with redis_client.Redis.from_url(first.redis) as client:
            client.set("key", "value")
        with ends_within(GONE_S, *self.pids(home)):
            assert down(home)
        assert running(home) is None
        assert up(home, 1) == first
        with redis_client.Redis.from_url(first.redis) as client:
            assert client.get("key") == b"value"

    def test_two_at_once_start_one(self, home: Path) -> None:
        program = "import sys, pathlib; from psa_store.launch import up; print(up(pathlib.Path(sys.argv[1]), 1).redis)"
        commands = [python(program, home) for _ in range(2)]
        outputs = [command.communicate(timeout=PATIENCE_S)[0].strip() for command in commands]
        found = running(home)
        assert found is not None and outputs == [found.redis] * 2
        with ends_within(GONE_S, *self.pids(home)):
            down(home)

    def test_a_glance_at_the_lock_does_not_keep_others_from_holding_it(self, home: Path) -> None:
        home.mkdir()
        glance = os.open(home / "up.pid", os.O_RDONLY | os.O_CREAT, 0o600)
        fcntl.flock(glance, fcntl.LOCK_SH)
        end_of_glance = threading.Timer(0.03, os.close, [glance])
        end_of_glance.start()
        let_go = hold_home(home)
        end_of_glance.join()
        assert let_go is not None
        assert hold_home(home) is None
        let_go()

    def test_servers_that_die_come_back_until_they_die_too_often(self, home: Path) -> None:
        up(home, 1)
        daemon, _, zookeeper = self.pids(home)
        with ends_within(PATIENCE_S, daemon, zookeeper):
            for _ in range(11):
                pid = self.pid(home, "redis/redis.pid")
                os.kill(pid, signal.SIGKILL)
                eventually(lambda pid=pid: running(home) is None or self.has_changed(home, pid))  # type: ignore[misc]
        assert "giving up" in (home / "up.log").read_text()
        assert running(home) is None

    def has_changed(self, home: Path, pid: int) -> bool:
        text = (home / "redis" / "redis.pid").read_text()
        return bool(text) and int(text.split()[0]) != pid

    def test_a_killed_daemon_takes_its_servers_along_and_up_works_at_once(self, home: Path) -> None:
        first = up(home, 1)
        daemon, *servers = self.pids(home)
        with ends_within(GONE_S, *servers):
            with ends_within(GONE_S, daemon):
                os.kill(daemon, signal.SIGKILL)
            assert up(home, 1) == first
        with redis_client.Redis.from_url(first.redis) as client:
            assert client.ping()
