"""Each fault of the network does what it says to real packets, heals, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chaos.cluster.network import LOOPBACK, Host, Network, enter, namespaces_available

_MISSING = namespaces_available()
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=_MISSING or "")

_NAMES = ("one", "two", "three")
_PORT = 4711
_SOON_S = 120.0
_SILENCE_S = 0.3
_CUT_S = 0.6


@pytest.fixture(scope="module")
def shared() -> Iterator[Network]:
    with Network(_NAMES) as network:
        yield network


@pytest.fixture
def network(shared: Network) -> Iterator[Network]:
    yield shared
    shared.heal()


def socket_on(host: Host, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A socket belongs to the namespace in which its thread was when it made it."""
    made: list[socket.socket] = []

    def make() -> None:
        if host.namespace is not None:
            enter(host.namespace)
        made.append(socket.socket(socket.AF_INET, kind))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    made[0].settimeout(_SOON_S)
    return made[0]


def connected(source: Host, target: Host) -> tuple[socket.socket, socket.socket]:
    with socket_on(target) as listener:
        listener.bind((target.address, 0))
        listener.listen()
        client = socket_on(source)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        server.settimeout(_SOON_S)
        return client, server


def passes(source: Host, target: Host) -> bool:
    """Whether a datagram arrives. The sender must not be told if it does not."""
    with socket_on(target, socket.SOCK_DGRAM) as receiver, socket_on(source, socket.SOCK_DGRAM) as sender:
        receiver.bind((target.address, _PORT))
        receiver.settimeout(_SILENCE_S)
        sender.connect((target.address, _PORT))
        sender.send(b"ping")
        try:
            return receiver.recv(16) == b"ping"
        except TimeoutError:
            return False


def names_of(pid: int) -> set[str]:
    """Of namespaces and links that belong to the networks of a process."""
    namespaces = Path("/var/run/netns")
    found = os.listdir(namespaces) if namespaces.exists() else []
    return {name for name in (*found, *os.listdir("/sys/class/net")) if name.startswith(f"psa{pid}")}


def test_every_host_reaches_every_other_and_so_does_this_machine(network: Network) -> None:
    hosts = [LOOPBACK, *map(network.host, _NAMES)]
    for source in hosts:
        for target in hosts[1:]:
            assert passes(source, target), f"{source} -> {target}"


def test_a_host_is_not_reached_at_the_loopback_address_of_another(network: Network) -> None:
    with socket_on(network.host("one")) as listener, socket_on(network.host("two")) as client:
        listener.bind(("127.0.0.1", _PORT))
        listener.listen()
        with pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", _PORT))


def test_cut_stops_both_directions_of_one_pair(network: Network) -> None:
    one, two, three = map(network.host, _NAMES)
    network.cut("one", "two")
    assert not passes(one, two)
    assert not passes(two, one)
    assert passes(one, three)
    assert passes(three, two)
    assert passes(LOOPBACK, one)
    network.heal()
    assert passes(one, two)
    assert passes(two, one)


def test_cut_one_way_leaves_the_other_way(network: Network) -> None:
    one, two, three = map(network.host, _NAMES)
    network.cut_one_way("one", "two")
    assert not passes(one, two)
    assert passes(two, one)
    assert passes(three, two)
    network.heal()
    assert passes(one, two)


def test_isolate_stops_everything_of_one_host(network: Network) -> None:
    one, two, three = map(network.host, _NAMES)
    network.isolate("one")
    for other in (two, three, LOOPBACK):
        assert not passes(other, one)
    assert not passes(one, two)
    assert passes(two, three)
    network.heal()
    assert passes(two, one)
    assert passes(one, two)


def test_a_connection_to_a_host_that_is_cut_off_is_not_refused_but_silent(network: Network) -> None:
    one, two, _ = map(network.host, _NAMES)
    network.cut("one", "two")
    with socket_on(one) as client:
        client.settimeout(_SILENCE_S)
        with pytest.raises(TimeoutError):
            client.connect((two.address, _PORT))


@pytest.mark.parametrize("fault", ["cut", "cut one way", "isolate"])
def test_a_tcp_connection_outlives_the_fault_and_goes_on(network: Network, fault: str) -> None:
    client, server = connected(network.host("one"), network.host("two"))
    with closing(client), closing(server):
        client.sendall(b"before")
        assert server.recv(16) == b"before"
        match fault:
            case "cut":
                network.cut("one", "two")
            case "cut one way":
                network.cut_one_way("one", "two")
            case _:
                network.isolate("two")
        client.sendall(b"during")
        server.settimeout(_CUT_S)
        with pytest.raises(TimeoutError):
            server.recv(16)
        network.heal()
        server.settimeout(_SOON_S)
        assert server.recv(16) == b"during"
        server.sendall(b"after")
        assert client.recv(16) == b"after"


def test_data_pass_against_the_direction_that_is_cut(network: Network) -> None:
    client, server = connected(network.host("one"), network.host("two"))
    with closing(client), closing(server):
        network.cut_one_way("one", "two")
        server.sendall(b"downhill")
        assert client.recv(16) == b"downhill"


@pytest.mark.parametrize("slow", ["one", "two"], ids=["sender", "receiver"])
def test_throttle_limits_what_a_host_sends_and_receives(network: Network, slow: str) -> None:
    size, rate = 300_000, 250_000
    client, server = connected(network.host("one"), network.host("two"))
    with closing(client), closing(server):
        assert transfer_s(client, server, size) < 0.5 * size / rate
        network.throttle(slow, rate)
        assert 0.8 * size / rate < transfer_s(client, server, size) < 4 * size / rate
        network.heal()
        assert transfer_s(client, server, size) < 0.5 * size / rate


def transfer_s(client: socket.socket, server: socket.socket, size: int) -> float:
    """How long so many bytes take."""
    began = time.monotonic()
    sender = threading.Thread(target=client.sendall, args=(bytes(size),))
    sender.start()
    left = size
    while left:
        left -= len(server.recv(left))
    sender.join()
    return time.monotonic() - began


def test_faults_add_up_and_heal_undoes_all_of_them(network: Network) -> None:
    one, two, three = map(network.host, _NAMES)
    network.cut("one", "two")
    network.isolate("three")
    network.throttle("one", 100_000)
    assert not passes(one, two)
    assert not passes(two, three)
    network.heal()
    network.heal()
    assert passes(one, two)
    assert passes(two, three)


def test_a_link_can_flap_fast(network: Network) -> None:
    one, two, _ = map(network.host, _NAMES)
    for _ in range(10):
        network.isolate("one")
        network.heal()
    assert passes(one, two)


def test_two_networks_live_side_by_side_and_leave_nothing(network: Network) -> None:
    before = names_of(os.getpid())
    with Network(["one"]) as other:
        assert other.host("one").address != network.host("one").address
        assert passes(LOOPBACK, other.host("one"))
        with pytest.raises(OSError, match="unreachable"):
            passes(network.host("two"), other.host("one"))
    assert names_of(os.getpid()) == before


def test_a_network_that_cannot_be_made_leaves_nothing() -> None:
    before = names_of(os.getpid())
    with pytest.raises(RuntimeError, match="name"), Network(["fine", "longer-than-a-link-may-be-called"]):
        pass
    assert names_of(os.getpid()) == before


def test_what_a_killed_harness_left_is_removed_by_the_next() -> None:
    program = (
        "from chaos.cluster.network import Network\nNetwork(['one']).__enter__()\nprint('up', flush=True)\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as harness:
        assert harness.stdout is not None
        assert harness.stdout.readline() == b"up\n"
        harness.send_signal(signal.SIGKILL)
    own = f"psa{harness.pid}a"
    assert names_of(harness.pid) == {own, f"{own}-one"}
    with Network(["two"]):
        assert names_of(harness.pid) == set()
