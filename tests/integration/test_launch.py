"""Private servers and supervision, with real programs and real deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from psa_store.cluster import ProcessRole
from psa_store.config import running
from psa_store.errors import DependencyUnreachable
from psa_store.launch import Child, PrivateRedis, PrivateZooKeeper, Supervisor, down, up
from psa_store.launch.up import PrivateServers
from tests.integration import children

PATIENCE_S = 120.0


def eventually(condition: Callable[[], bool]) -> bool:
    """Poll for something that no event tells of: another process's death or file."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


class TestPrivateServers:
    def test_redis_keeps_its_data_and_addresses(self, tmp_path: Path) -> None:
        server = PrivateRedis(tmp_path)
        server.start(120)
        try:
            url, pid = server.url, server.pid
            with redis.Redis.from_url(server.url) as client:
                client.set("a", "1")
                assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
                assert client.config_get("appendonly")["appendonly"] == "yes"
            server.kill()
            assert not server.running
            again = PrivateRedis(tmp_path)
            server = again
            again.start(120)
            assert again.url == url and again.pid != pid
            with redis.Redis.from_url(url) as client:
                assert client.get("a") == b"1"
        finally:
            server.stop()

    def test_an_ensemble_of_three_survives_one(self, tmp_path: Path) -> None:
        server = PrivateZooKeeper(tmp_path, nodes=3)
        server.start(120)
        try:
            assert len(server.hosts.split(",")) == 3
            server.kill(1)
            assert not server.running
            server.start(120)
            assert server.running
        finally:
            server.stop()

    @pytest.mark.parametrize("restarts", [2, 1])
    def test_what_is_killed_while_it_starts_is_started_again_within_the_budget(
        self, tmp_path: Path, restarts: int
    ) -> None:
        servers, left, killed = PrivateServers(tmp_path), iter(range(restarts)), list[str]()

        def kill_twice() -> None:
            pid_path = tmp_path / "zookeeper-1" / "node0.pid"
            while len(killed) < 2 and not done.is_set():
                words = pid_path.read_text().split() if pid_path.exists() else []
                if len(words) != 2:
                    time.sleep(0.001)  # the file of a process that starts: polled, it must not serve before it is hit
                elif words[0] not in killed:  # Java has not begun to serve by then
                    killed.append(words[0])
                    os.kill(int(words[0]), signal.SIGKILL)

        done = threading.Event()
        killer = threading.Thread(target=kill_twice)
        killer.start()
        try:
            if restarts == 2:
                servers.start_again(lambda: next(left, None) is not None)
                assert servers.running
            else:
                with pytest.raises(DependencyUnreachable, match="does not start"):
                    servers.start_again(lambda: next(left, None) is not None)
            assert len(killed) == 2 and next(left, None) is None
        finally:
            done.set()
            killer.join()
            servers.close()

    def test_a_missing_program_is_named_with_the_way_to_get_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(DependencyUnreachable, match="apt-get install redis-server"):
            PrivateRedis(tmp_path / "redis").start(1)
        with pytest.raises(DependencyUnreachable, match="apt-get install zookeeper"):
            PrivateZooKeeper(tmp_path / "zookeeper").start(1)

    def test_a_server_that_cannot_start_says_why(self, tmp_path: Path) -> None:
        with pytest.raises(DependencyUnreachable, match="no-such-option"):
            PrivateRedis(tmp_path, {"no-such-option": "1"}).start(10)


class TestUp:
    @pytest.fixture
    def home(self, tmp_path: Path) -> Iterator[Path]:
        yield tmp_path
        down(tmp_path)

    def test_up_twice_is_one_and_down_ends_it(self, home: Path) -> None:
        assert running(home) is None and not down(home)
        first = up(home, 1)
        assert up(home, 1) == first == running(home)
        with redis.Redis.from_url(first.redis) as client:
            assert client.ping()
        assert down(home)
        assert running(home) is None
        assert up(home, 1) == first, "addresses survive"

    def test_a_server_that_dies_is_started_again(self, home: Path) -> None:
        addresses = up(home, 1)
        with redis.Redis.from_url(addresses.redis) as client:
            client.set("kept", "yes")
            pid = int(client.info("server")["process_id"])
        os.kill(pid, signal.SIGKILL)

        def back() -> bool:
            try:
                with redis.Redis.from_url(addresses.redis) as client:
                    return client.get("kept") == b"yes" and int(client.info("server")["process_id"]) != pid
            except redis.exceptions.ConnectionError:
                return False

        assert eventually(back)


class TestSupervisor:
    @pytest.fixture
    def seen(self) -> dict[str, list[Any]]:
        return {"exits": [], "messages": []}

    def make(self, seen: dict[str, list[Any]], restarts_max: int) -> Supervisor:
        def on_exit(child: Child) -> None:
            seen["exits"].append((child.member, time.monotonic()))

        return Supervisor(
            preload=[], restarts_max=restarts_max, env={}, on_exit=on_exit, on_message=seen["messages"].append
        )

    def test_a_dead_child_is_reported_at_once_and_comes_back_under_another_name(
        self, seen: dict[str, list[Any]], tmp_path: Path
    ) -> None:
        killed_s: list[float] = []

        def until() -> bool:
            if len(seen["messages"]) == 1 and not killed_s:
                (child,) = supervisor.alive(ProcessRole.WORKER)
                assert child.process.pid is not None
                killed_s.append(time.monotonic())
                os.kill(child.process.pid, signal.SIGKILL)
            return len(seen["messages"]) == 2

        with closing(self.make(seen, restarts_max=1)) as supervisor:
            first = supervisor.spawn(ProcessRole.WORKER, children.wait_for_sigterm, str(tmp_path))
            assert supervisor.run(until) == 0
            assert seen["exits"][0][0] == first.member
            assert seen["exits"][0][1] - killed_s[0] < 1.0
            members = [message["member"] for message in seen["messages"]]
            assert members[0] == first.member != members[1]
            assert supervisor.stop(ProcessRole.WORKER, PATIENCE_S) == 0

    def test_the_budget_ends(self, seen: dict[str, list[Any]], tmp_path: Path) -> None:
        def until() -> bool:
            for child in supervisor.alive(ProcessRole.WORKER):
                assert child.process.pid is not None
                os.kill(child.process.pid, signal.SIGKILL)
            return False

        with closing(self.make(seen, restarts_max=2)) as supervisor:
            supervisor.spawn(ProcessRole.WORKER, children.wait_for_sigterm, str(tmp_path))
            assert supervisor.run(until) == 1
        assert len(seen["exits"]) == 3

    @pytest.mark.parametrize("code", [1, 2, 4])
    def test_a_failure_that_will_not_pass_ends_the_run(self, seen: dict[str, list[Any]], code: int) -> None:
        with closing(self.make(seen, restarts_max=5)) as supervisor:
            supervisor.spawn(ProcessRole.WORKER, children.fail, code)
            assert supervisor.run(lambda: False) == code
        assert len(seen["exits"]) == 1

    def test_children_die_with_a_killed_supervisor(self, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-m", "tests.integration.children", str(tmp_path)]) as supervisor:
            assert eventually(lambda: len(list(tmp_path.iterdir())) == 2)
            pids = [int(path.name) for path in tmp_path.iterdir()]
            supervisor.kill()
        assert eventually(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
