"""Private servers, `psa up`, the supervisor: what they start answers, what dies comes back, nothing stays behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client
from kazoo.client import KazooClient

from psa_store.cluster import ProcessRole
from psa_store.errors import DependencyUnreachable
from psa_store.launch import (
    Child,
    PrivateRedis,
    PrivateZooKeeper,
    Supervisor,
    Verdict,
    after_exit,
    down,
    running,
    supervisor,
    up,
)
from psa_store.launch.supervisor import reported_code
from psa_store.launch.up import hold_home
from psa_store.wire import announce

PATIENCE_S = 120.0
GONE_S = 2.0
ROOT = Path(__file__).parents[2]


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for something that gives no event, such as a file that another process writes."""
    pause, end_s = threading.Event(), time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end_s, "it did not happen in time"
        pause.wait(0.02)


@contextlib.contextmanager
def ends_within(timeout_s: float, *pids: int) -> Iterator[None]:
    """What happens inside ends these processes, soon."""
    handles = [os.pidfd_open(pid) for pid in pids]
    try:
        yield
        end_s = time.monotonic() + timeout_s
        for pid, handle in zip(pids, handles, strict=True):
            assert select.select([handle], [], [], max(0.0, end_s - time.monotonic()))[0], f"{pid} still runs"
    finally:
        for handle in handles:
            os.close(handle)


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process, leader of its own process group, whose output can be read."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


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
            with redis_client.Redis.from_url(server.tcp_url, decode_responses=True) as client:
                assert client.config_get("appendfsync") == {"appendfsync": "always"}
        finally:
            server.stop()

    @pytest.mark.parametrize("end", [PrivateRedis.stop, PrivateRedis.kill])
    def test_data_and_addresses_survive(self, redis: PrivateRedis, end: Callable[[PrivateRedis], None]) -> None:
        addresses, pid = (redis.url, redis.tcp_url), redis.pid
        with redis_client.Redis.from_url(redis.url) as client:
            client.set("key", "value")
        with ends_within(GONE_S, pid):
            end(redis)
        assert not redis.running
        again = PrivateRedis(Path(redis.url.removeprefix("unix://")).parent)
        again.start(PATIENCE_S)
        try:
            assert (again.url, again.tcp_url) == addresses
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

    def test_a_path_too_long_for_a_socket_leaves_tcp(self, tmp_path: Path) -> None:
        server = PrivateRedis(tmp_path / ("long" * 30))
        assert server.url == server.tcp_url
        server.start(PATIENCE_S)
        server.stop()

    def test_a_stranger_on_its_port_is_not_taken_for_it(self, redis: PrivateRedis, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "port").write_text(redis.tcp_url.rpartition(":")[2])
        with pytest.raises(DependencyUnreachable, match="Address already in use"):
            PrivateRedis(other).start(PATIENCE_S)

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
        client = KazooClient(hosts=hosts, timeout=4.0)
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
        program = "import sys, pathlib; from psa_store.launch import up; print(up(pathlib.Path(sys.argv[1]), 1))"
        commands = [python(program, home) for _ in range(2)]
        outputs = [command.communicate(timeout=PATIENCE_S)[0].strip() for command in commands]
        assert outputs == [str(running(home))] * 2
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


@pytest.mark.parametrize(
    ("exit_code", "restarts_left", "stopping", "verdict"),
    [
        (0, 5, False, Verdict.DONE),
        (0, 0, False, Verdict.DONE),
        (-signal.SIGKILL, 1, False, Verdict.RESTART),
        (-signal.SIGSEGV, 0, False, Verdict.FAIL),
        (3, 1, False, Verdict.RESTART),
        (3, 0, False, Verdict.FAIL),
        (255, 1, False, Verdict.RESTART),
        (255, 0, False, Verdict.FAIL),
        (1, 5, False, Verdict.FAIL),
        (2, 5, False, Verdict.FAIL),
        (4, 5, False, Verdict.FAIL),
        (-signal.SIGTERM, 5, True, Verdict.DONE),
        (1, 5, True, Verdict.DONE),
    ],
)
def test_after_exit(exit_code: int, restarts_left: int, stopping: bool, verdict: Verdict) -> None:
    assert after_exit(exit_code, restarts_left, stopping) is verdict


@pytest.mark.parametrize(
    ("exit_code", "stopping", "reported"),
    [
        (0, False, 0),
        (2, False, 2),
        (4, True, 4),
        (255, False, 1),
        (-signal.SIGKILL, False, 1),
        (-signal.SIGKILL, True, 1),
        (-signal.SIGTERM, False, 1),
        (-signal.SIGTERM, True, 0),
    ],
)
def test_reported_codes_are_documented_ones(exit_code: int, stopping: bool, reported: int) -> None:
    assert reported_code(exit_code, stopping) == reported


# What children do. They are found by name in the child, so they live at the top of this module.


def say(**more: Any) -> None:
    document = {"member": os.environ["PSA_MEMBER"], "pid": os.getpid(), "parent": os.getppid(), **more}
    announce(Path(os.environ["PSA_SUPERVISOR"]), document)


def wait_for_the_end() -> None:
    say()
    signal.pause()


def leave_cleanly() -> None:
    """Take a while to leave, as a worker does that finishes its step."""

    def leave(_number: int, _frame: object) -> None:
        time.sleep(0.3)  # the work that is left when the signal comes, not a wait for an event
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    wait_for_the_end()


def refuse_to_leave() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say()
    while True:
        signal.pause()


def leave_with(code: int) -> None:
    sys.exit(code)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("this one is meant to be seen in the output")


def look_around() -> None:
    say(mark=os.environ["MARK"], stdin=sys.stdin.read(), sigterm=signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)


class Watch:
    """A supervisor, and what it told us."""

    def __init__(self, restarts_max: int = 10) -> None:
        self.messages: list[dict[str, Any]] = []
        self.deaths: list[tuple[str, int]] = []
        self.died_s: list[float] = []
        self.react: Callable[[dict[str, Any]], None] = lambda _message: None
        self.supervisor = Supervisor(
            preload=["psa_store.worker"],
            restarts_max=restarts_max,
            env={"MARK": "42"},
            on_exit=self._on_exit,
            on_message=self._on_message,
        )

    def run(self, messages: int = 1 << 30) -> int:
        """Run until so many messages came, or no child is left."""
        end_s = time.monotonic() + PATIENCE_S

        def enough() -> bool:
            assert time.monotonic() < end_s, "it did not happen in time"
            return len(self.messages) >= messages or not self.supervisor.alive(ProcessRole.WORKER)

        return self.supervisor.run(until=enough)

    def _on_exit(self, child: Child) -> None:
        self.died_s.append(time.monotonic())
        self.deaths.append((child.member, child.exit_code))

    def _on_message(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.react(message)


@pytest.fixture
def watch() -> Iterator[Watch]:
    with closing_watch(10) as it:
        yield it


@contextlib.contextmanager
def closing_watch(restarts_max: int) -> Iterator[Watch]:
    it = Watch(restarts_max)
    try:
        yield it
    finally:
        it.supervisor.close()


class TestSupervisor:
    def test_a_child_has_its_environment_no_input_and_default_signals(self, watch: Watch) -> None:
        child = watch.supervisor.spawn(ProcessRole.WORKER, look_around)
        assert watch.run() == 0
        (message,) = watch.messages
        assert message["member"] == child.member
        assert (message["mark"], message["stdin"], message["sigterm"]) == ("42", "", True)
        assert watch.deaths == [(child.member, 0)]

    def test_a_killed_child_is_noticed_at_once_and_comes_back_under_another_name(
        self, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "_TICK_S", 10.0)  # nothing below may depend on polling
        killed_s: list[float] = []

        def kill(message: dict[str, Any]) -> None:
            killed_s.append(time.monotonic())
            os.kill(message["pid"], signal.SIGKILL)

        watch.react = kill
        watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        assert watch.run(messages=6) == 0
        members = [message["member"] for message in watch.messages]
        assert len(set(members)) == 6
        assert watch.deaths == [(member, -signal.SIGKILL) for member in members[:5]]
        noticed_s = [died - killed for died, killed in zip(watch.died_s, killed_s, strict=False)]
        assert statistics.median(noticed_s) < 0.1, noticed_s

    def test_deaths_beyond_the_budget_end_the_run(self) -> None:
        with closing_watch(restarts_max=2) as watch:
            watch.supervisor.spawn(ProcessRole.WORKER, be_killed)
            assert watch.run() == 1
            assert [code for _, code in watch.deaths] == [-signal.SIGKILL] * 3

    def test_an_unreachable_dependency_is_tried_again_within_the_budget(self) -> None:
        with closing_watch(restarts_max=2) as watch:
            watch.supervisor.spawn(ProcessRole.WORKER, leave_with, 3)
            assert watch.run() == 3
            assert [code for _, code in watch.deaths] == [3] * 3

    @pytest.mark.parametrize(("status", "code"), [(1, 1), (2, 2), (4, 4), (-1, 1)])
    def test_an_error_that_will_not_pass_ends_the_run(self, watch: Watch, status: int, code: int) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, leave_with, status)
        assert watch.run() == code
        assert len(watch.deaths) == 1

    def test_an_exception_ends_the_run(self, watch: Watch, capfd: pytest.CaptureFixture[str]) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, fail)
        assert watch.run() == 1
        assert len(watch.deaths) == 1

    def test_stop_waits_for_children_that_leave(self, watch: Watch) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, leave_cleanly)
        watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        watch.supervisor.spawn(ProcessRole.SERVER, wait_for_the_end)
        watch.run(messages=3)
        assert watch.supervisor.stop(ProcessRole.WORKER, PATIENCE_S) == 0
        assert sorted(code for _, code in watch.deaths) == [-signal.SIGTERM, 0]
        assert len(watch.supervisor.alive(ProcessRole.SERVER)) == 1

    def test_stop_kills_children_that_do_not_leave(self, watch: Watch) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, refuse_to_leave)
        watch.run(messages=1)
        assert watch.supervisor.stop(ProcessRole.WORKER, 0.3) == 1
        assert [code for _, code in watch.deaths] == [-signal.SIGKILL]

    def test_a_child_that_is_stopped_while_it_starts_does_not_miss_it(self, watch: Watch) -> None:
        for _ in range(5):
            watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        started_s = time.monotonic()
        watch.supervisor.stop(ProcessRole.WORKER, PATIENCE_S)
        assert time.monotonic() - started_s < PATIENCE_S / 2

    def test_a_signal_ends_the_run_and_leaves_the_children_to_stop(self, watch: Watch) -> None:
        watch.react = lambda _message: os.kill(os.getpid(), signal.SIGTERM)
        watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        assert watch.run() == 128 + signal.SIGTERM
        assert len(watch.supervisor.alive(ProcessRole.WORKER)) == 1

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signals_are_given_back(self, number: signal.Signals) -> None:
        former = signal.getsignal(number)
        with closing_watch(restarts_max=0):
            assert signal.getsignal(number) != former
        assert signal.getsignal(number) is former

    def test_a_second_ctrl_c_does_not_wait(self, watch: Watch) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    def test_a_killed_fork_server_costs_restarts_not_the_run(self, watch: Watch) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        watch.run(messages=1)
        os.kill(watch.messages[0]["parent"], signal.SIGKILL)
        assert watch.run(messages=2) == 0
        assert watch.messages[0]["parent"] != watch.messages[1]["parent"]


OWN_SUPERVISOR = """
import sys
from psa_store.cluster import ProcessRole
from psa_store.launch import Supervisor
from tests.integration import test_launch_faults

it = Supervisor(
    preload=[], restarts_max=0, env={}, on_exit=lambda child: print("left", child.exit_code, flush=True),
    on_message=lambda message: print(message["parent"], message["pid"], flush=True),
)
for _ in range(2):
    it.spawn(ProcessRole.WORKER, getattr(test_launch_faults, sys.argv[1]))
code = it.run(until=lambda: not it.alive(ProcessRole.WORKER))
print("stopped", code, it.stop(ProcessRole.WORKER, 20), flush=True)
it.close()
"""


def test_a_killed_supervisor_takes_its_children_along() -> None:
    with python(OWN_SUPERVISOR, "wait_for_the_end") as process:
        pids = {int(word) for _ in range(2) for word in read_line(process).split()}
        assert len(pids) == 3  # two children and the fork server
        with ends_within(GONE_S, *pids):
            process.kill()


def test_a_signal_to_the_whole_process_group_loses_no_exit_code() -> None:
    with python(OWN_SUPERVISOR, "leave_cleanly") as process:
        pids = {int(word) for _ in range(2) for word in read_line(process).split()}
        with ends_within(PATIENCE_S, *pids):
            os.killpg(process.pid, signal.SIGTERM)
            lines = [read_line(process) for _ in range(3)]
        assert lines == ["left 0", "left 0", f"stopped {128 + signal.SIGTERM} 0"]


def test_being_told_to_stop_again_and_again_does_not_interrupt_the_stopping() -> None:
    with python(OWN_SUPERVISOR, "leave_cleanly") as process:
        for _ in range(2):
            read_line(process)
        with ThreadPoolExecutor(1) as pool:
            output = pool.submit(process.communicate)
            while not wait([output], timeout=0.02).done:
                process.send_signal(signal.SIGTERM)
        assert output.result()[0].splitlines() == ["left 0", "left 0", f"stopped {128 + signal.SIGTERM} 0"]
