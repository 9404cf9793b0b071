"""The checkpoint barrier at a real ZooKeeper. What dies in the middle of it: tests/chaos/test_barrier_drill.py."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Iterator

import pytest
from kazoo.client import KazooClient

from chaos.neighbour import plain_client
from psa_store import cluster
from psa_store.cluster import ProcessRole
from psa_store.coordination import Barrier, BarrierState, Coordination
from psa_store.coordination.barrier import BARRIERS_KEPT
from psa_store.errors import UsageError
from tests.harness import Site

OPEN, DONE, ABORTED = BarrierState
PATIENCE_S = 120.0


class Member:
    """A member of the job with a session of its own."""

    def __init__(self, hosts: str, job: str, name: str) -> None:
        self.name, self.news = name, threading.Event()
        self.door = Coordination(hosts, job, session_timeout_s=3.0, connect_timeout_s=10.0, wake=self.news.set)

    def start(self) -> None:
        self.door.start()
        self.door.join(ProcessRole.SERVER, cluster.Member(self.name, "", 4711))

    def arrive(self, barrier: str, version: int = 0) -> Barrier | None:
        return self.door.arrive(barrier, self.name, version)


@pytest.fixture
def job() -> str:
    return f"job-{secrets.token_hex(4)}"


@pytest.fixture
def members(site: Site, job: str) -> Iterator[list[Member]]:
    with contextlib.ExitStack() as stack:
        made = [Member(site.zookeeper, job, name) for name in ("a", "b")]
        for each in made:
            stack.callback(each.door.close)
            each.start()
        yield made


@pytest.fixture
def raw(site: Site) -> Iterator[KazooClient]:
    client = plain_client(site.zookeeper)
    client.start(10)
    yield client
    client.stop()
    client.close()


def state(barrier: Barrier | None) -> BarrierState:
    assert barrier is not None
    return barrier.state


def test_the_last_to_arrive_opens_the_way_for_all(members: list[Member]) -> None:
    first, last = members
    opened = first.door.open_barrier(1, ["a", "b"])
    assert state(first.arrive(opened, 7)) is OPEN
    first.news.clear()
    assert state(first.door.read_barrier(opened, watch=True)) is OPEN
    found = last.arrive(opened, 8)
    assert found is not None and found.state is DONE
    assert found.versions == {"a": 7, "b": 8}
    assert first.news.wait(PATIENCE_S)
    assert first.door.read_barrier(opened) == found


def test_a_person_can_read_it(members: list[Member], raw: KazooClient, job: str) -> None:
    opened = members[0].door.open_barrier(4, ["b", "a", "b"])
    members[0].arrive(opened, 7)
    data, stat = raw.get(f"/psa/{job}/barriers/{opened}")
    assert json.loads(data) == {
        "format": 1,
        "state": "open",
        "term": 4,
        "members": ["a", "b"],
        "versions": {},
        "reason": "",
    }
    assert raw.get_children(f"/psa/{job}/barriers/{opened}") == ["a"] and stat.ephemeralOwner == 0


def test_arriving_twice_is_arriving_once_and_strangers_do_not_count(members: list[Member]) -> None:
    one, other = members
    opened = one.door.open_barrier(1, ["a", "b"])
    assert state(one.arrive(opened)) is OPEN and state(one.arrive(opened)) is OPEN
    assert state(other.door.arrive(opened, "stranger", 0)) is OPEN
    assert state(other.arrive(opened)) is DONE


def test_a_member_that_dies_before_it_arrives_aborts_it(members: list[Member]) -> None:
    one, other = members
    opened = one.door.open_barrier(1, ["a", "b"])
    one.arrive(opened)
    assert state(one.door.settle_barrier(opened)) is OPEN
    one.door.remove(ProcessRole.SERVER, "b")
    found = one.door.settle_barrier(opened)
    assert found is not None and found.state is ABORTED and "b" in found.reason
    assert other.arrive(opened) == found


def test_an_arrival_ends_with_its_session(members: list[Member]) -> None:
    one, other = members
    opened = one.door.open_barrier(1, ["a", "b"])
    other.arrive(opened)
    other.door.close()
    assert state(one.arrive(opened)) is OPEN
    assert state(one.door.settle_barrier(opened)) is ABORTED


def test_a_newer_term_aborts_it_even_if_all_arrive(members: list[Member]) -> None:
    one, other = members
    opened = one.door.open_barrier(one.door.next_term(), ["a", "b"])
    one.arrive(opened)
    newer = other.door.next_term()
    found = other.arrive(opened)
    assert found is not None and found.state is ABORTED and f"term {newer}" in found.reason


def test_a_member_that_will_not_wait_aborts_it_for_all(members: list[Member]) -> None:
    one, other = members
    opened = one.door.open_barrier(1, ["a", "b"])
    one.arrive(opened)
    found = one.door.settle_barrier(opened, expired=True)
    assert found is not None and found.state is ABORTED and "missing: b" in found.reason
    assert other.arrive(opened) == found
    assert other.door.settle_barrier(opened, expired=True) == found


def test_many_decide_at_once_and_read_one_outcome(members: list[Member]) -> None:
    for _ in range(20):
        opened = members[0].door.open_barrier(1, ["a", "b"])
        found: list[Barrier | None] = []

        def impatient(member: Member, opened: str = opened, found: list[Barrier | None] = found) -> None:
            member.arrive(opened)
            found.append(member.door.settle_barrier(opened, expired=True))

        threads = [threading.Thread(target=impatient, args=(member,)) for member in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] == found[1] == members[0].door.read_barrier(opened)
        assert state(found[0]) is not OPEN


def test_old_barriers_go(members: list[Member], raw: KazooClient, job: str) -> None:
    door = members[0].door
    opened = [door.open_barrier(1, ["a", "b"]) for _ in range(BARRIERS_KEPT)]
    members[0].arrive(opened[0])
    opened += [door.open_barrier(1, ["a", "b"]) for _ in range(3)]
    assert sorted(raw.get_children(f"/psa/{job}/barriers")) == opened[-BARRIERS_KEPT:]
    for ask in (door.read_barrier, door.settle_barrier):
        assert ask(opened[0]) is None
    assert members[0].arrive(opened[0]) is None
    assert raw.exists(f"/psa/{job}/barriers/{opened[0]}") is None


def test_what_is_not_a_barrier_is_over(members: list[Member], raw: KazooClient, job: str) -> None:
    door = members[0].door
    with pytest.raises(UsageError, match="at least one member"):
        door.open_barrier(1, [])
    opened = door.open_barrier(1, ["a"])
    raw.set(f"/psa/{job}/barriers/{opened}", b"[]")
    barrier = members[0].arrive(opened)
    assert barrier is not None and barrier.state is BarrierState.ABORTED and "cannot be read" in barrier.reason
    again = door.open_barrier(1, ["a", "b"])
    raw.create(f"/psa/{job}/barriers/rubbish", b"{")
    members[0].arrive(again)
    raw.set(f"/psa/{job}/barriers/{again}/a", b"garbage")
    barrier = members[1].arrive(again)
    assert barrier is not None and barrier.state is BarrierState.ABORTED and "can not be read" in barrier.reason


def test_a_term_that_begins_in_the_moment_of_the_decision_aborts(
    members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last to arrive has read the old term and is about to write DONE when a controller takes the next one."""
    first, last = members
    term = first.door.next_term()
    opened = first.door.open_barrier(term, ["a", "b"])
    first.arrive(opened)

    def at(name: str, _number: int = 0) -> None:
        if name == "barrier.before_decision":
            monkeypatch.undo()
            assert first.door.next_term() > term

    monkeypatch.setattr("psa_store.coordination.barrier.failpoint", at)
    seen = last.arrive(opened)
    assert seen is not None and seen.state is ABORTED, seen
