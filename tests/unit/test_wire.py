"""Frames over real sockets: torn, lying and strange peers, parking, sending without copies, and passing memory."""

from __future__ import annotations

import array
import os
import random
import resource
import select
import socket
import sys
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.errors import Disconnected, Refused
from psa_store.wire import PARK, Connection, Flag, Header, Kind, Park, Reason, SharedMemory
from psa_store.wire.frames import HEADER_BYTES, MAGIC, unpack

numbers = st.integers(0, 2**32 - 1)


@given(
    st.builds(
        Header,
        kind=st.sampled_from(Kind),
        term=numbers,
        revision=numbers,
        step=st.integers(-1, 2**62),
        rank=numbers,
        shard=numbers,
        reason=st.sampled_from(Reason),
        flags=st.sampled_from(Flag),
        memory=numbers,
        shards=numbers,
        length=st.just(0),
        barrier=numbers,
        weight=st.floats(0.0, width=32),
        stage=st.integers(0, 2**16 - 1),
        microbatch=st.integers(0, 2**16 - 1),
        stages=numbers,
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
        (lambda data: Header(Kind.WANT, length=1).pack(), "at most 0"),
        (lambda data: Header(Kind.RELAY, flags=Flag.BY_REFERENCE, length=(1 << 20) + 1).pack(), "at most 1048576"),
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


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on unread bytes is Linux's")
@pytest.mark.parametrize("waits", [False, True])
def test_only_a_connection_that_is_told_to_waits_for_a_peer_that_lives_and_does_not_read(waits: bool) -> None:
    """A worker reads between its steps only; elsewhere no peer may hold a connection up for longer than 5 s."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    connection = Connection(near, "peer", lambda _connection, header: memoryview(bytearray(header.length)))
    try:
        if waits:
            connection.wait_for_slow_reader()
        payload = bytes(64 << 20)  # more than all buffers on the way
        connection.send(Header(Kind.PARAMS, length=len(payload)), payload)
        connection.flush()
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLERR)
        assert bool(poll.poll(8_000)) is not waits
    finally:
        connection.close()
        far.close()


def test_a_diverted_payload_leaves_its_first_place_alone(pair: tuple[Connection, Peer]) -> None:
    sender, peer = pair
    memory = bytearray(100)
    peer.place = memoryview(memory)
    sender._sock.sendall(Header(Kind.PUSH, length=100).pack() + b"x" * 10)
    assert list(peer.connection.receive()) == []
    peer.connection.divert()
    sender._sock.sendall(b"y" * 90)
    assert len(list(peer.connection.receive())) == 1
    assert memory == b"x" * 10 + bytes(90)


def test_garbage_is_refused(pair: tuple[Connection, Peer]) -> None:
    sender, peer = pair
    sender._sock.sendall(b"GET / HTTP/1.1\r\n" + bytes(HEADER_BYTES))
    with pytest.raises(Refused):
        list(peer.connection.receive())
    assert MAGIC not in b"GET / HTTP/1.1"


# There is no memfd to pass elsewhere, and the product passes none.
@pytest.mark.skipif(sys.platform != "linux", reason="memory is passed on Linux only")
class TestDescriptors:
    @pytest.fixture
    def ends(self) -> Iterator[tuple[socket.socket, Connection]]:
        """A raw socket, and the connection at its other end, which takes any payload."""
        raw, theirs = socket.socketpair()
        connection = Connection(theirs, "peer", lambda _connection, header: memoryview(bytearray(header.length)))
        yield raw, connection
        raw.close()
        connection.close()

    def test_one_comes_with_the_frame_that_it_was_sent_with(self, ends: tuple[socket.socket, Connection]) -> None:
        raw, receiver = ends
        sender = Connection(raw, "sender", lambda _connection, _header: memoryview(b""))
        sent = frames_with_and_without_memory(random.Random(5), 200)
        for header, payload, memory in sent:
            sender.send(header, payload, memory)
        found: list[tuple[Header, bytes, int | None]] = []
        while len(found) < len(sent):
            sender.flush()
            found += take_all(receiver)
        assert found == [(header, payload, mark_of(memory)) for header, payload, memory in sent]

    def test_one_comes_with_its_frame_although_every_byte_comes_alone(
        self, ends: tuple[socket.socket, Connection]
    ) -> None:
        raw, receiver = ends
        found: list[tuple[Header, bytes, int | None]] = []
        sent = frames_with_and_without_memory(random.Random(6), 20, payload_bytes_max=50)
        for header, payload, memory in sent:
            for place, byte in enumerate(header.pack() + payload):
                send_with(raw, bytes([byte]), [memory.fd] if memory is not None and place == 0 else [])
                found += take_all(receiver)
        assert found == [(header, payload, mark_of(memory)) for header, payload, memory in sent]

    @pytest.mark.parametrize(
        ("parts", "words"),
        [
            ([(Header(Kind.PULL).pack(), 1)], "passed a descriptor with PULL"),
            ([(Header(Kind.HELLO, length=2).pack() + b"{}", 1)], "passed a descriptor with HELLO"),
            ([(Header(Kind.SHARE).pack(), 2)], "more than one"),
            ([(Header(Kind.SHARE).pack(), 100)], "more than one"),
            ([(Header(Kind.SHARE).pack()[:1], 1), (Header(Kind.SHARE).pack()[1:], 1)], "more than one"),
            ([(Header(Kind.SHARE).pack()[:1], 1), (Header(Kind.SHARE).pack()[1:], 2)], "more than one"),
            ([(b"GET / HTTP/1.1".ljust(HEADER_BYTES), 1)], "not a psa frame"),
        ],
        ids=["wrong kind", "wrong kind with payload", "two", "a hundred", "one and one", "one and two", "garbage"],
    )
    def test_what_may_not_come_is_refused_and_closed(
        self, ends: tuple[socket.socket, Connection], parts: list[tuple[bytes, int]], words: str
    ) -> None:
        raw, receiver = ends
        memory = SharedMemory.create("test", 1)
        before = descriptors()
        for data, count in parts:
            send_with(raw, data, [memory.fd] * count)
        with pytest.raises(Refused, match=words):
            take_all(receiver)
        receiver.close()
        assert descriptors() == before - 1, "only the connection's own may be gone"

    def test_a_frame_that_may_bring_one_may_come_without(self, ends: tuple[socket.socket, Connection]) -> None:
        raw, receiver = ends
        raw.sendall(Header(Kind.SHARE).pack())
        assert take_all(receiver) == [(Header(Kind.SHARE), b"", None)]

    def test_one_that_was_not_taken_is_closed_with_the_connection(self, ends: tuple[socket.socket, Connection]) -> None:
        raw, receiver = ends
        memory = SharedMemory.create("test", 1)
        before = descriptors()
        send_with(raw, Header(Kind.SHARE).pack(), [memory.fd])
        assert [header.kind for header, _ in receiver.receive()] == [Kind.SHARE]
        assert descriptors() == before + 1
        receiver.close()
        assert descriptors() == before - 1

    def test_one_that_comes_in_the_middle_of_a_payload_goes_nowhere(
        self, ends: tuple[socket.socket, Connection]
    ) -> None:
        raw, receiver = ends
        memory = SharedMemory.create("test", 1)
        before = descriptors()
        raw.sendall(Header(Kind.HELLO, length=4).pack() + b"da")
        assert take_all(receiver) == []
        send_with(raw, b"ta", [memory.fd])
        raw.sendall(Header(Kind.SHARE).pack())
        assert [(payload, mark) for _, payload, mark in take_all(receiver)] == [(b"data", None), (b"", None)]
        assert descriptors() == before

    def test_one_that_got_lost_for_want_of_descriptors_is_noticed(self, ends: tuple[socket.socket, Connection]) -> None:
        raw, receiver = ends
        memory = SharedMemory.create("test", 1)
        send_with(raw, Header(Kind.SHARE).pack(), [memory.fd])
        former = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(memory.fd)  # the lowest free number: a limit there leaves none
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, former[1]))
        try:
            with pytest.raises(Refused, match="too many open files"):
                list(receiver.receive())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, former)

    def test_detaching_copies_payloads_and_keeps_headers_and_memory(
        self, ends: tuple[socket.socket, Connection]
    ) -> None:
        raw, receiver = ends
        sender = Connection(raw, "sender", lambda _connection, _header: memoryview(b""))
        memory = marked(77)
        payload = bytearray(b"a" * (32 << 20))  # more than a socket takes
        sender.send(Header(Kind.PARAMS, shard=1, length=len(payload)), memoryview(payload))
        sender.send(Header(Kind.VERSION, step=5), memory=memory)
        sender.send(Header(Kind.PARAMS, shard=2, length=4), memoryview(payload)[:4])
        sender.flush()
        sender.detach()
        payload[:] = b"b" * len(payload)
        found: list[tuple[Header, bytes, int | None]] = []
        while len(found) < 3:
            sender.flush()
            found += take_all(receiver)
        assert [(header.kind, header.shard, header.step, mark) for header, _, mark in found] == [
            (Kind.PARAMS, 1, 0, None),
            (Kind.VERSION, 0, 5, 77),
            (Kind.PARAMS, 2, 0, None),
        ]
        assert found[0][1] == b"a" * len(payload) and found[2][1] == b"aaaa"


def marked(mark: int) -> SharedMemory:
    """Memory that can be told from others by its first byte."""
    memory = SharedMemory.create("test", 1)
    memory.buffer[0] = mark
    return memory


def mark_of(memory: SharedMemory | None) -> int | None:
    return None if memory is None else memory.buffer[0]


def frames_with_and_without_memory(
    rng: random.Random, count: int, payload_bytes_max: int = 100_000
) -> Sequence[tuple[Header, bytes, SharedMemory | None]]:
    frames: list[tuple[Header, bytes, SharedMemory | None]] = []
    for number in range(count):
        if rng.random() < 0.5:
            payload = rng.randbytes(rng.randrange(payload_bytes_max))
            frames.append((Header(Kind.PUSH, step=number, length=len(payload)), payload, None))
        else:
            kind = rng.choice([Kind.SHARE, Kind.VERSION])
            frames.append((Header(kind, step=number), b"", marked(number % 256) if rng.random() < 0.7 else None))
    return frames


def send_with(raw: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert raw.sendmsg([data], rights) == len(data)


def take_all(connection: Connection) -> list[tuple[Header, bytes, int | None]]:
    """The frames that are complete by now, each with the mark of the memory that came with it."""
    found = []
    for header, payload in connection.receive():
        descriptor = connection.take_descriptor()
        mark = mark_of(SharedMemory.attach(descriptor, 1)) if descriptor is not None else None
        found.append((header, bytes(payload), mark))
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
