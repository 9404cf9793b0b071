"""Frames over real sockets: torn, lying and strange peers, parking, and sending without copies."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.errors import Disconnected, Refused
from psa_store.wire import PARK, Connection, Flag, Header, Kind, Park, Reason
from psa_store.wire.frames import HEADER_BYTES, MAGIC, unpack

numbers = st.integers(0, 2**32 - 1)


@given(
    st.builds(
        Header,
        kind=st.sampled_from(Kind),
        epoch=numbers,
        revision=numbers,
        step=st.integers(-1, 2**62),
        rank=numbers,
        shard=numbers,
        reason=st.sampled_from(Reason),
        flags=st.sampled_from(Flag),
        slot=numbers,
        count=numbers,
    )
)
def test_headers_survive(header: Header) -> None:
    assert len(header.pack()) == HEADER_BYTES
    assert unpack(header.pack()) == header


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda data: b"HTTP" + data[4:], "not a psa frame"),
        (lambda data: data[:4] + b"\xff" + data[5:], "another protocol version"),
        (lambda data: data[:5] + b"\xff" + data[6:], "another protocol version"),
        (lambda data: Header(Kind.HELLO, length=1 << 40).pack(), "at most"),
        (lambda data: Header(Kind.PUSH, flags=Flag.BY_REFERENCE, length=1).pack(), "at most 0"),
        (lambda data: Header(Kind.AWAIT, length=1).pack(), "at most 0"),
    ],
)
def test_strange_headers_are_refused(damage: object, what: str) -> None:
    with pytest.raises(Refused, match=what):
        unpack(damage(Header(Kind.HELLO).pack()))  # type: ignore[operator]


class Peer:
    """One end of a socket pair that receives into memory which the test chose."""

    def __init__(self, sock: socket.socket) -> None:
        self.place: memoryview | Park = memoryview(bytearray())
        self.connection = Connection(sock, "peer", lambda _connection, _header: self.place)


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Peer]]:
    ours, theirs = socket.socketpair()
    sender = Connection(ours, "sender", lambda _connection, _header: memoryview(bytearray()))
    peer = Peer(theirs)
    yield sender, peer
    sender.close()
    peer.connection.close()


def test_a_payload_lands_in_the_place_that_was_named(pair: tuple[Connection, Peer]) -> None:
    sender, peer = pair
    memory = bytearray(1 << 20)
    peer.place = memoryview(memory)
    payload = bytes(range(256)) * 4096
    sender.send(Header(Kind.PUSH, length=len(payload), shard=3), payload)
    found: list[Header] = []
    while not found:
        sender.flush()
        found += [header for header, _ in peer.connection.receive()]
    assert memory == payload and found[0].shard == 3


def test_a_detached_payload_may_change_before_it_is_sent(pair: tuple[Connection, Peer]) -> None:
    sender, peer = pair
    size = 64 << 20
    payload = bytearray(b"a" * size)
    memory = bytearray(size)
    peer.place = memoryview(memory)
    sender.send(Header(Kind.PARAMS, length=size), memoryview(payload))
    sender.flush()
    assert sender.sending, "the socket took everything: nothing to detach"
    sender.detach()
    payload[:] = b"b" * size
    done = False
    while not done:
        sender.flush()
        done = any(True for _ in peer.connection.receive())
    assert memory == b"a" * size


def test_a_parked_frame_waits_and_then_goes_on(pair: tuple[Connection, Peer]) -> None:
    sender, peer = pair
    peer.place = PARK
    sender.send(Header(Kind.PUSH, length=4), b"data")
    sender.send(Header(Kind.PULL), b"")
    sender.flush()
    assert list(peer.connection.receive()) == [] and peer.connection.parked
    peer.place = memoryview(bytearray(4))
    peer.connection.resume()
    header, payload = next(iter(peer.connection.receive()))
    assert header.kind is Kind.PUSH and bytes(payload) == b"data"


def test_a_length_that_lies_is_refused(pair: tuple[Connection, Peer]) -> None:
    sender, peer = pair
    peer.place = memoryview(bytearray(8))
    sender.send(Header(Kind.PUSH, length=4096), bytes(4096))
    sender.flush()
    with pytest.raises(Refused, match="4096 bytes, expected 8"):
        list(peer.connection.receive())


def test_a_peer_that_dies_in_the_middle_of_a_frame_is_noticed(pair: tuple[Connection, Peer]) -> None:
    sender, peer = pair
    peer.place = memoryview(bytearray(100))
    sender._sock.sendall(Header(Kind.PUSH, length=100).pack() + b"only this")
    sender.close()
    with pytest.raises(Disconnected, match="closed"):
        list(peer.connection.receive())


def test_a_diverted_payload_leaves_its_first_place_alone(pair: tuple[Connection, Peer]) -> None:
    sender, peer = pair
    memory = bytearray(100)
    peer.place = memoryview(memory)
    sender._sock.sendall(Header(Kind.PUSH, length=100).pack() + b"x" * 10)
    assert list(peer.connection.receive()) == []
    peer.connection.divert(memoryview(bytearray(200)))
    sender._sock.sendall(b"y" * 90)
    assert len(list(peer.connection.receive())) == 1
    assert memory == b"x" * 10 + bytes(90)


def test_garbage_is_refused(pair: tuple[Connection, Peer]) -> None:
    sender, peer = pair
    sender._sock.sendall(b"GET / HTTP/1.1\r\n" + bytes(HEADER_BYTES))
    with pytest.raises(Refused):
        list(peer.connection.receive())
    assert MAGIC not in b"GET / HTTP/1.1"
