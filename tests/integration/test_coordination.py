"""Coordination against a real ZooKeeper: members, election and plan, and what holds when processes or ZooKeeper die.

One file, since all of it runs against one ZooKeeper, which these tests pause, kill and cut off by the same means.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from chaos.proxy import Proxy as SlowLink
from psa_store.cluster import JobShape, Member, Plan, ProcessRole
from psa_store.coordination import CheckpointRequest, Coordination, StoredPlan, as_access
from psa_store.coordination.session import SessionState
from psa_store.errors import DependencyUnreachable, Disconnected, UsageError
from psa_store.job.config import JobConfig
from psa_store.job.document import Damaged
from psa_store.launch import PrivateZooKeeper
from tests.harness import stop_process

SERVER, WORKER = ProcessRole.SERVER, ProcessRole.WORKER
SESSION_S = 3.0
PATIENCE_S = 120.0


class Process:
    """A coordination and the news that it was told of."""

    def __init__(self, hosts: str, job: str, session_s: float = SESSION_S, connect_s: float = 5.0) -> None:
        self.news = threading.Event()
        self.door = Coordination(
            hosts, job, session_timeout_s=session_s, connect_timeout_s=connect_s, wake=self.news.set
        )


Enter = Callable[..., Process]


def member(name: str, says: str = "one") -> Member:
    return Member(name, says, 4711)


def plan(says: str) -> Plan:
    return Plan(1, 1, 0, (), (), (says,))


def config(says: str) -> JobConfig:
    return JobConfig("job", 2, 0, {"name": "SGD"}, says)


@pytest.fixture(scope="module")
def zookeeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateZooKeeper]:
    private = PrivateZooKeeper(tmp_path_factory.mktemp("zookeeper"))
    private.start(120)
    yield private
    private.stop()


@pytest.fixture
def job() -> str:
    return f"job-{secrets.token_hex(4)}"


@pytest.fixture
def enter(zookeeper: PrivateZooKeeper, job: str) -> Iterator[Enter]:
    """Makes started processes' doors to ``job``; all are closed in the end."""
    with contextlib.ExitStack() as doors:

        def make(hosts: str | None = None, **kwargs: float) -> Process:
            process = Process(hosts or zookeeper.hosts, job, **kwargs)
            doors.callback(process.door.close)
            process.door.start()
            return process

        yield make


@pytest.fixture
def door(enter: Enter) -> Coordination:
    return enter().door


def eventually(holds: Callable[[], bool], news: threading.Event | None = None) -> None:
    """Wait until ``holds``; looks again when there is news, and now and then."""
    news = news or threading.Event()
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        news.wait(0.05)
        news.clear()


CHILD = """
import sys
from psa_store.cluster import Member, Plan, ProcessRole
from psa_store.coordination import Coordination
from psa_store.errors import Disconnected
door = Coordination(sys.argv[1], sys.argv[2], session_timeout_s=2, connect_timeout_s=5, wake=lambda: None)
door.start()
for line in sys.stdin:
    try:
        print(repr(eval(line)), flush=True)
    except Disconnected as error:
        print("Disconnected", flush=True)
door.close()
"""


class Child:
    """Another process with a session of its own; evaluates expressions over its ``door``."""

    def __init__(self, hosts: str, job: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, hosts, job], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, expression: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def child(zookeeper: PrivateZooKeeper, job: str) -> Iterator[Child]:
    process = Child(zookeeper.hosts, job)
    yield process
    process.end()


@contextlib.contextmanager
def paused(zookeeper: PrivateZooKeeper) -> Iterator[None]:
    for pid in zookeeper.pids:
        stop_process(pid)
    try:
        yield
    finally:
        for pid in zookeeper.pids:
            os.kill(pid, signal.SIGCONT)


class Proxy:
    """A TCP proxy that loses the answer to one request, or puts garbage between the answers."""

    def __init__(self, target: PrivateZooKeeper) -> None:
        self._target = target.addresses[0]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.hosts = target.hosts_at([self._listener.getsockname()])
        self.lose_answer_to: bytes | None = None
        self.garbage = b""
        self.fired = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="proxy")
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _serve(self) -> None:
        with contextlib.ExitStack() as open_sockets, selectors.DefaultSelector() as ready:
            ready.register(open_sockets.enter_context(self._listener), selectors.EVENT_READ)
            pairs: dict[socket.socket, socket.socket] = {}
            upstreams: set[socket.socket] = set()
            while not self._stop.is_set():
                for key, _ in ready.select(0.02):
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    if source is self._listener:
                        client = open_sockets.enter_context(self._listener.accept()[0])
                        try:
                            upstream = open_sockets.enter_context(socket.create_connection(self._target))
                        except OSError:
                            client.close()
                            continue
                        pairs |= {client: upstream, upstream: client}
                        upstreams.add(upstream)
                        ready.register(client, selectors.EVENT_READ)
                        ready.register(upstream, selectors.EVENT_READ)
                    elif source in pairs and not self._relay(source, pairs[source], source in upstreams):
                        for end in (source, pairs[source]):
                            ready.unregister(end)
                            del pairs[end]
                            end.close()

    def _relay(self, source: socket.socket, sink: socket.socket, from_server: bool) -> bool:
        try:
            data = source.recv(65536)
            if from_server and self.garbage:
                data, self.garbage = data + self.garbage, b""
                self.fired += 1
            sink.sendall(data)
            if not from_server and self.lose_answer_to is not None and self.lose_answer_to in data:
                sink.recv(65536)  # so it was carried out
                self.lose_answer_to = None
                self.fired += 1
                return False
            return bool(data)
        except OSError:
            return False


@pytest.fixture
def proxy(zookeeper: PrivateZooKeeper) -> Iterator[Proxy]:
    between = Proxy(zookeeper)
    yield between
    between.close()


# --- documents


def test_a_job_is_created_once(door: Coordination, enter: Enter, job: str) -> None:
    assert door.read_config() is None
    assert door.create_config(config("first"))
    assert not enter().door.create_config(config("second"))
    assert door.read_config() == config("first")
    assert job in door.jobs()


def test_of_two_writers_of_the_plan_the_slower_gets_none(door: Coordination, enter: Enter) -> None:
    other = enter().door
    assert door.read_plan() is None
    created = door.write_plan(plan("one"), None)
    assert created is not None
    assert other.write_plan(plan("also one"), None) is None
    written = other.write_plan(plan("two"), created)
    assert written is not None
    assert door.write_plan(plan("also two"), created) is None
    assert door.read_plan() == written
    assert written.plan == plan("two")


def test_a_plan_that_is_watched_wakes_when_it_comes_and_when_it_changes(enter: Enter, door: Coordination) -> None:
    reader = enter()
    assert reader.door.read_plan(watch=True) is None
    reader.news.clear()
    created = door.write_plan(plan("one"), None)
    assert created is not None
    assert reader.news.wait(PATIENCE_S)
    assert reader.door.read_plan(watch=True) == created
    reader.news.clear()
    door.write_plan(plan("two"), created)
    assert reader.news.wait(PATIENCE_S)


def test_terms_are_unique_under_contention(door: Coordination, enter: Enter) -> None:
    taken: list[list[int]] = [[] for _ in range(4)]
    doors = [door, door, enter().door, enter().door]

    def take(mine: list[int], through: Coordination) -> None:
        mine.extend(through.next_term() for _ in range(10))

    threads = [threading.Thread(target=take, args=pair) for pair in zip(taken, doors, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in taken)
    assert sorted(term for mine in taken for term in mine) == list(range(1, 41))
    assert door.next_term(at_least=100) == 101
    assert door.next_term(at_least=7) == 102


def test_a_text_that_a_znode_cannot_hold_is_refused(door: Coordination) -> None:
    with pytest.raises(UsageError, match="900000"):
        door.hold("large", "x" * 900_001)
    assert door.hold("large", "x" * 900_000) is None


def test_a_deleted_job_is_gone(door: Coordination, job: str) -> None:
    door.create_config(config("c"))
    door.next_term()
    door.join(SERVER, member("s"))
    door.campaign("s")
    door.delete_job()
    door.delete_job()
    assert job not in door.jobs()
    assert door.read_config() is None


def test_a_chroot_is_created(enter: Enter, zookeeper: PrivateZooKeeper, job: str) -> None:
    below = enter(f"{zookeeper.hosts}/team/a").door
    assert below.jobs() == []
    below.create_config(config("c"))
    assert below.jobs() == [job]
    assert job not in enter().door.jobs()


# --- what another process wrote


GARBAGE = ["", "{", "[]", "9" * 400, "\x00", '{"format": 99}', "[" * 50_000]


def write(door: Coordination, name: str, text: str) -> None:
    """As any process may that reaches ZooKeeper."""
    path = f"{door._job}/{name}"
    door._session.run(lambda znodes: znodes.set(path, text) or znodes.create(path, text))


def delete(door: Coordination, name: str) -> None:
    door._session.run(lambda znodes: znodes.delete(f"{door._job}/{name}"))


def candidate(door: Coordination) -> str:
    (name,) = door._session.run(lambda znodes: znodes.children(door._election))
    return f"election/{name}"


@pytest.mark.parametrize("text", ["nonsense", "", "-1", "9" * 40, str(1 << 52), "{}"])
def test_after_a_damaged_term_all_are_greater_than_any_that_was_taken(door: Coordination, text: str) -> None:
    taken = [door.next_term(), door.next_term()]
    write(door, "term", text)
    damaged = door.read_term(0)
    assert isinstance(damaged, Damaged) and "no term" in damaged.why and door.set_aside == 1
    assert door.next_term(at_least=1) > taken[-1], "one that was taken and is not sealed yet"
    assert door.set_aside == 1, "the same damage counts once"


@pytest.mark.parametrize("text", ["nonsense", "0", None])
def test_a_term_that_is_damaged_lower_or_gone_is_mended(door: Coordination, text: str | None) -> None:
    door.next_term(at_least=6)
    if text is None:
        delete(door, "term")
    else:
        write(door, "term", text)
    door.mend_term(7)
    mended = door.read_term(7)
    assert isinstance(mended, int) and mended > 7
    door.mend_term(7)
    assert door.read_term(7) == mended, "once"


@pytest.mark.parametrize("text", GARBAGE)
def test_a_damaged_document_comes_out_as_a_value_and_is_replaced_by_what_was_seen(
    door: Coordination, text: str
) -> None:
    stored = door.write_plan(plan("p"), None)
    door.create_config(config("c"))
    door.request_checkpoint("best", CheckpointRequest())
    for name in ("plan", "config", "checkpoints/best"):
        write(door, name, text)
    assert door.write_plan(plan("q"), stored) is None, "it is another text by now"
    seen = door.read_plan()
    assert isinstance(seen, Damaged) and seen.where.endswith("/plan") and seen.why
    assert isinstance(door.read_config(), Damaged)
    assert isinstance(door.read_checkpoint_request("best"), Damaged)
    written = door.write_plan(plan("q"), seen)
    assert written is not None and door.read_plan() == written
    assert {each.where.rpartition("/")[2] for each in door.damage()} == {"plan", "config", "best"}
    assert door.damage() == [] and door.set_aside == 3


def test_a_plan_of_another_shape_is_no_plan_of_this_job(door: Coordination) -> None:
    door.write_plan(plan("p"), None)
    assert isinstance(door.read_plan(JobShape(shards=1, ranks=1)), StoredPlan)
    assert isinstance(door.read_plan(JobShape(shards=1, ranks=2)), Damaged)


@pytest.mark.parametrize("text", [*GARBAGE, member("another").to_json()])
def test_a_member_whose_znode_is_overwritten_writes_it_again(enter: Enter, door: Coordination, text: str) -> None:
    watched = enter()
    watched.door.join(WORKER, member("w"))
    watched.door.update(WORKER, member("w"))
    watched.news.clear()
    write(door, "workers/w", text)
    assert watched.news.wait(PATIENCE_S)
    found = door.members(WORKER)["w"]
    assert isinstance(found, Damaged) and found.kept and door.living(WORKER) == ["w"]
    watched.door.update(WORKER, member("w"))
    assert door.members(WORKER) == {"w": member("w")} and watched.door.set_aside == 1


def test_a_member_whose_znode_is_deleted_or_taken_is_told_to_join_again(enter: Enter, door: Coordination) -> None:
    other = enter().door
    for taken in (False, True):
        name = f"w{taken}"
        other.join(WORKER, member(name))
        delete(door, f"workers/{name}")
        if taken:
            door.join(WORKER, member(name))
        with pytest.raises(Disconnected):
            other.update(WORKER, member(name))


def test_a_znode_that_no_process_keeps_is_no_member_no_candidate_and_no_holder(door: Coordination) -> None:
    write(door, "workers/w", member("w").to_json())
    write(door, "election/0000000000000000-0000000000", "w")
    write(door, "election/rubbish", "w")
    write(door, "run", "another run")
    found = door.members(WORKER)["w"]
    assert isinstance(found, Damaged) and not found.kept and door.living(WORKER) == []
    door.campaign("s")
    assert door.elected() == "s" and door.is_elected("s")
    assert door.hold("run", "this run") is None and door.holder("run") == "this run"


def test_what_shows_that_a_name_is_held_is_written_again(enter: Enter, door: Coordination) -> None:
    watched = enter()
    assert watched.door.hold("run", "this run") is None
    for change in (delete, partial(write, text="{")):
        watched.news.clear()
        change(door, "run")
        assert watched.news.wait(PATIENCE_S)
        assert watched.door.hold("run", "this run") is None
        assert door.holder("run") == "this run"


def test_a_candidate_whose_znode_is_overwritten_or_deleted_campaigns_again(door: Coordination) -> None:
    door.campaign("s")
    write(door, candidate(door), "garbage")
    assert not door.is_elected("s")
    door.campaign("s")
    assert door.is_elected("s")
    delete(door, candidate(door))
    door.campaign("s")
    assert door.is_elected("s")


# --- members


def test_members_come_change_and_go(enter: Enter, door: Coordination) -> None:
    watcher = enter()

    def members() -> dict[str, Member]:
        return watcher.door.members(WORKER, watch=True)

    assert members() == {}
    door.join(WORKER, member("w", "one"))
    eventually(lambda: members() == {"w": member("w", "one")}, watcher.news)
    door.update(WORKER, member("w", "two"))
    eventually(lambda: members() == {"w": member("w", "two")}, watcher.news)
    door.leave(WORKER, "w")
    door.leave(WORKER, "w")
    eventually(lambda: members() == {}, watcher.news)
    with pytest.raises(Disconnected):
        door.update(WORKER, member("w", "three"))


@pytest.mark.parametrize("change", ["join", "update", "leave", "first worker"])
def test_watched_members_wake(enter: Enter, door: Coordination, change: str) -> None:
    door.join(SERVER, member("s", "one"))
    watcher = enter()
    assert watcher.door.members(SERVER, watch=True) == {"s": member("s", "one")}
    assert watcher.door.members(WORKER, watch=True) == {}
    watcher.news.clear()
    if change == "join":
        enter().door.join(SERVER, member("t", "one"))
    elif change == "first worker":
        door.join(WORKER, member("w", "one"))
    elif change == "update":
        door.update(SERVER, member("s", "two"))
    else:
        door.leave(SERVER, "s")
    assert watcher.news.wait(PATIENCE_S)


def test_closing_ends_membership_at_once(enter: Enter, door: Coordination) -> None:
    leaving = enter().door
    leaving.join(SERVER, member("s"))
    leaving.close()
    leaving.close()
    assert door.members(SERVER) == {}
    with pytest.raises(Disconnected):
        leaving.read_plan()


def test_a_process_that_joins_under_another_id_leaves_no_ghost(door: Coordination) -> None:
    door.join(SERVER, member("old"))
    door.campaign("old")
    door.join(SERVER, member("new"))
    door.campaign("new")
    assert door.members(SERVER) == {"new": member("new")}
    assert door.is_elected("new")
    assert not door.is_elected("old")


def test_joining_replaces_what_a_former_session_left(door: Coordination, child: Child) -> None:
    assert child.ask("door.join(ProcessRole.WORKER, Member('w', 'old', 1))") == "None"
    child.end()
    door.join(WORKER, member("w", "new"))
    assert door.members(WORKER) == {"w": member("w", "new")}
    door.update(WORKER, member("w", "newer"))


# --- election


def test_the_next_candidate_takes_over_when_the_elected_one_is_killed(enter: Enter, child: Child) -> None:
    assert child.ask("door.campaign('first')") == "None"
    assert child.ask("door.is_elected('first')") == "True"
    second, third = enter(), enter()
    second.door.campaign("second")
    second.door.campaign("second")
    third.door.campaign("third")
    assert not second.door.is_elected("second")
    assert not third.door.is_elected("third")
    assert third.door.elected() == "first"
    second.news.clear()
    third.news.clear()
    child.end()
    assert second.news.wait(PATIENCE_S)
    assert second.door.is_elected("second")
    assert third.door.elected() == "second"
    assert not third.news.is_set(), "only the next candidate is woken"
    assert not third.door.is_elected("third")


def test_a_candidate_that_is_reported_dead_goes_at_once(enter: Enter, child: Child) -> None:
    child.ask("door.join(ProcessRole.SERVER, Member('first', '', 1))")
    child.ask("door.campaign('first')")
    heir, supervisor = enter(), enter().door
    heir.door.campaign("heir")
    assert not heir.door.is_elected("heir")
    heir.news.clear()
    supervisor.remove(SERVER, "first")
    supervisor.remove(SERVER, "first")
    assert heir.news.wait(PATIENCE_S)
    assert heir.door.is_elected("heir")
    assert supervisor.members(SERVER) == {}
    assert child.ask("door.is_elected('first')") == "False"
    assert child.ask("door.update(ProcessRole.SERVER, Member('first', '', 1))") == "Disconnected"


# --- a held name


def test_a_name_has_one_holder(enter: Enter) -> None:
    one, two = enter(), enter()
    assert one.door.holder("run") is None
    assert one.door.hold("run", "one") is None
    assert one.door.hold("run", "one") is None
    two.door.release("run")
    assert two.door.hold("run", "two") == "one"
    assert two.door.holder("run") == "one"
    two.news.clear()
    one.door.release("run")
    one.door.release("run")
    assert two.news.wait(PATIENCE_S)
    assert two.door.hold("run", "two") is None


# --- ZooKeeper away


def test_an_unreachable_zookeeper_is_named_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        hosts = f"127.0.0.1:{reserved.getsockname()[1]}"
    process = Process(hosts, "job", connect_s=2.0)
    began_s = time.monotonic()
    with pytest.raises(DependencyUnreachable, match=hosts):
        process.door.start()
    assert time.monotonic() - began_s < 3.0


def test_a_zookeeper_that_accepts_and_says_nothing_is_named_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = f"127.0.0.1:{silent.getsockname()[1]}"
        process = Process(hosts, "job", session_s=20.0, connect_s=2.0)
        began_s = time.monotonic()
        with pytest.raises(DependencyUnreachable, match=hosts):
            process.door.start()
        assert time.monotonic() - began_s < 3.0


@pytest.mark.parametrize("hosts", ["", "host:port", "a:1,,b:2"])
def test_an_unusable_address_is_refused(hosts: str) -> None:
    with pytest.raises(UsageError, match="host:port"):
        Process(hosts, "job")


def test_the_lease_runs_out_while_zookeeper_is_silent_and_comes_back(enter: Enter, zookeeper: PrivateZooKeeper) -> None:
    process = enter()
    process.door.join(SERVER, member("s"))
    assert SESSION_S / 3 < process.door.lease_left_s() <= SESSION_S * 2 / 3
    with paused(zookeeper):
        began_s = time.monotonic()
        eventually(lambda: process.door.lease_left_s() <= 0)
        assert time.monotonic() - began_s < SESSION_S
    eventually(lambda: process.door.lease_left_s() > 0)
    assert process.door.session_generation() == 0


def test_the_lease_counts_from_the_sending_of_a_heartbeat(enter: Enter, zookeeper: PrivateZooKeeper) -> None:
    """However long its answer takes: ZooKeeper may have counted from the moment at which it was sent."""
    way_s = 0.6
    with contextlib.closing(SlowLink(zookeeper.addresses[0])) as link:
        door = enter(zookeeper.hosts_at([("127.0.0.1", link.port)])).door
        door.join(SERVER, member("s"))
        link.delay(way_s)
        for _ in range(3):  # from the second one on it was sent over the slow link
            seen_s = door.lease.until_s
            eventually(partial(lambda seen_s: door.lease.until_s != seen_s, seen_s))
        assert door.lease_left_s() <= door.session_timeout_s * 2 / 3 - 2 * way_s


def test_a_call_during_an_outage_ends_in_time(enter: Enter, zookeeper: PrivateZooKeeper) -> None:
    door = enter(connect_s=1.0).door
    with paused(zookeeper):
        for _ in range(2):
            began_s = time.monotonic()
            with pytest.raises(DependencyUnreachable, match=str(as_access(zookeeper.hosts))):
                door.read_plan()
            assert 0.9 < time.monotonic() - began_s < PATIENCE_S
        began_s = time.monotonic()
        door.close()
        assert time.monotonic() - began_s < 2.5


def test_a_session_survives_a_killed_zookeeper(enter: Enter, zookeeper: PrivateZooKeeper) -> None:
    process = enter(session_s=10.0)  # longer than ZooKeeper takes to come back, on a busy machine too
    process.door.join(WORKER, member("w", "one"))
    process.door.create_config(config("c"))
    assert process.door.read_plan(watch=True) is None
    zookeeper.kill()
    process.news.clear()
    zookeeper.start(120)
    assert process.news.wait(PATIENCE_S), "told to read again after reconnecting"
    eventually(lambda: process.door.lease_left_s() > 0)
    assert process.door.session_generation() == 0
    assert process.door.members(WORKER) == {"w": member("w", "one")}
    process.door.update(WORKER, member("w", "two"))
    assert process.door.read_config() == config("c")
    assert process.door.next_term() == 1
    assert process.door.write_plan(plan("p"), None) is not None


def test_after_an_expiry_the_lease_waits_for_a_new_join(enter: Enter, child: Child) -> None:
    observer = enter().door
    assert child.ask("door.join(ProcessRole.SERVER, Member('s', 'one', 1))") == "None"
    assert child.ask("door.lease_left_s() > 0") == "True"
    child.signal(signal.SIGSTOP)
    eventually(lambda: observer.members(SERVER) == {})
    child.signal(signal.SIGCONT)
    assert child.ask("door.lease_left_s() <= 0") == "True"
    eventually(lambda: child.ask("door.session_generation()") == "1")
    assert child.ask("door.update(ProcessRole.SERVER, Member('s', 'two', 1))") == "Disconnected"
    time.sleep(0.5)  # long enough for a heartbeat: it alone must not bring the lease back
    assert child.ask("door.lease_left_s() <= 0") == "True"
    assert child.ask("door.join(ProcessRole.SERVER, Member('s+1', 'three', 1))") == "None"
    eventually(lambda: child.ask("door.lease_left_s() > 0") == "True")
    assert observer.members(SERVER) == {"s+1": Member("s+1", "three", 1)}


# --- unknown outcomes


def test_a_plan_whose_answer_was_lost_counts_as_written(enter: Enter, proxy: Proxy) -> None:
    door = enter(proxy.hosts).door
    created = door.write_plan(plan("plan-one"), None)
    assert created is not None
    proxy.lose_answer_to = b"plan-two"
    written = door.write_plan(plan("plan-two"), created)
    assert proxy.fired == 1
    assert written is not None
    assert written.version == created.version + 1
    assert door.read_plan() == written


def test_a_creation_whose_answer_was_lost_counts_as_done(enter: Enter, proxy: Proxy, door: Coordination) -> None:
    door.join(SERVER, member("other"))
    door.campaign("other")  # the folders exist now, so the request that is cut off is the creation itself
    distant = enter(proxy.hosts).door
    calls: list[tuple[bytes, Callable[[], object], object]] = [
        (b"the-config", lambda: distant.create_config(config("the-config")), True),
        (b"the-plan", lambda: distant.write_plan(plan("the-plan"), None) is not None, True),
        (b"the-text", lambda: distant.join(SERVER, member("s", "the-text")), None),
        (b"the-candidate", lambda: distant.campaign("the-candidate"), None),
        (b"the-holder", lambda: distant.hold("run", "the-holder"), None),
    ]
    for number, (marker, call, expected) in enumerate(calls):
        proxy.lose_answer_to = marker
        assert call() == expected, marker
        assert proxy.fired == number + 1
    assert door.members(SERVER) == {"other": member("other"), "s": member("s", "the-text")}
    assert door.holder("run") == "the-holder"
    door.remove(SERVER, "other")
    assert distant.is_elected("the-candidate")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unreadable_answer_does_not_end_the_client(enter: Enter, proxy: Proxy) -> None:
    process = enter(proxy.hosts)
    process.door.create_config(config("c"))
    proxy.garbage = b"\0\0\0\2xx"
    eventually(lambda: proxy.fired == 1)
    eventually(lambda: process.door.session_generation() == 1)
    assert process.door.read_config() == config("c")


# --- resources


def test_nothing_is_left_after_close(zookeeper: PrivateZooKeeper, job: str) -> None:
    def round_trip() -> None:
        process = Process(zookeeper.hosts, job)
        process.door.start()
        process.door.join(WORKER, member("w"))
        assert process.door.session_state is SessionState.CONNECTED
        assert process.door.peer == str(as_access(zookeeper.hosts))
        assert process.door.session_timeout_s == SESSION_S
        process.door.close()
        assert process.door.session_state is SessionState.CLOSED

    round_trip()
    threads, fds = threading.active_count(), psutil.Process().num_fds()
    for _ in range(10):
        round_trip()
    assert (threading.active_count(), psutil.Process().num_fds()) == (threads, fds)


def test_the_granted_timeout_counts_not_the_wanted_one(enter: Enter) -> None:
    door = enter(session_s=600.0).door
    granted_s = door.session_timeout_s
    assert granted_s < 600.0
    assert door.lease_left_s() <= granted_s * 2 / 3


def test_an_ensemble_goes_on_when_its_leader_is_killed(tmp_path: Path, job: str) -> None:
    ensemble = PrivateZooKeeper(tmp_path, nodes=3)
    try:
        ensemble.start(60.0)
        process = Process(ensemble.hosts, job, session_s=4.0)
        try:
            process.door.start()
            process.door.join(SERVER, member("s", "one"))
            term = process.door.next_term()
            ensemble.kill(_leader(ensemble))
            assert process.door.next_term() == term + 1
            eventually(lambda: process.door.lease_left_s() > 0)
            process.door.update(SERVER, member("s", "two"))
            assert process.door.session_generation() == 0
        finally:
            process.door.close()
    finally:
        ensemble.stop()


def _leader(ensemble: PrivateZooKeeper) -> int:
    for node, address in enumerate(ensemble.addresses):
        with socket.create_connection(address, 5.0) as connection, connection.makefile("rb") as answer:
            connection.sendall(b"srvr")
            if b"Mode: leader" in answer.read():
                return node
    raise AssertionError("no leader")
