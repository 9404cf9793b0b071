"""What a server lets in, and how little those may have that have proved nothing."""

from __future__ import annotations

import encodings.idna  # noqa: F401 - another user may not be able to read where it lies
import os
import resource
import secrets
import selectors
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from psa_store.server import entrance as entrance_module
from psa_store.server.entrance import Candidate, Entrance, Limits
from psa_store.server.refusals import Refusals
from psa_store.wire import (
    Accepting,
    Door,
    FirstFrame,
    Header,
    Kind,
    Role,
    announce,
    connect,
    host_identity,
    listen_local,
)
from psa_store.wire.announce import listen_announcements, read_announcement

KEY = b"a key of the cluster"
NOT_ROOT = 65534
TEN = Limits(10, 1 << 20)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are of Linux")


class Scene:
    """An entrance at an abstract socket, turned by hand."""

    def __init__(self, door: Door, limits: Limits = TEN) -> None:
        self.refused: list[str] = []
        self.proved: list[tuple[socket.socket, Accepting | FirstFrame]] = []
        self.selector = selectors.DefaultSelector()
        self.local = f"psa-test-{secrets.token_hex(8)}"
        listener = listen_local(self.local)
        assert listener is not None
        refusals = Refusals(lambda: self.refused.append("one"))
        self.entrance = Entrance([listener], self.selector, door, limits, refusals, self._on_proved)
        self.clients: list[socket.socket] = []

    def _on_proved(self, sock: socket.socket, _peer: str, proof: Accepting | FirstFrame) -> None:
        self.proved.append((sock, proof))

    def client(self, says: bytes = b"") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect("\0" + self.local)
        sock.sendall(says)
        self.clients.append(sock)
        return sock

    def turn(self) -> None:
        """Deal with all that has come."""
        while events := self.selector.select(0.0):
            for key, _ in events:
                if isinstance(key.data, Candidate):
                    self.entrance.serve(key.data)
                else:
                    self.entrance.accept(key.data)
        self.entrance.sweep()

    def close(self) -> None:
        self.entrance.close()
        self.selector.close()
        for sock in [*self.clients, *(sock for sock, _ in self.proved)]:
            sock.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def of(door: Door, limits: Limits = TEN) -> Scene:
        scenes.append(Scene(door, limits))
        return scenes[-1]

    yield of
    for scene in scenes:
        scene.close()


def is_closed(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def as_another_user(act: Callable[[], bool]) -> bool:
    """What ``act`` returns in a process of another user."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            os.setgroups([])
            os.setgid(NOT_ROOT)
            os.setuid(NOT_ROOT)
            code = 0 if act() else 1
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1)
    return code == 0


INSPECT = Header(Kind.INSPECT).pack()


def test_there_are_never_more_than_the_limit_and_the_oldest_goes(make: Callable[..., Scene]) -> None:
    scene = make(Door("a", KEY))
    clients = [scene.client(b"P") for _ in range(25)]
    scene.turn()
    assert len(scene.entrance) == TEN.unproved_max and len(scene.refused) == 15
    assert [is_closed(sock) for sock in clients] == [True] * 15 + [False] * 10


def test_a_peer_with_the_key_is_let_in_among_the_silent(make: Callable[..., Scene]) -> None:
    scene = make(Door("a", KEY))
    for _ in range(9):
        scene.client()
    scene.turn()
    # In a process of its own, since it waits for the answer of this one.
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            connect("127.0.0.1:1", scene.local, host_identity(), 20.0, Door("a", KEY), Role.SERVER).close()
            code = 0
        finally:
            os._exit(code)
    while not scene.proved:
        scene.selector.select(20.0)
        scene.turn()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert scene.proved[0][1].role is Role.SERVER and not scene.refused


def test_time_is_limited(make: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrance_module, "_UNPROVED_S", 0.0)
    scene = make(Door("a", KEY))
    client = scene.client(b"PSA")
    scene.turn()
    scene.turn()
    monkeypatch.setattr(entrance_module, "_SWEEP_S", 0.0)
    scene.entrance._sweep_at_s = 0.0
    scene.turn()
    assert is_closed(client) and len(scene.entrance) == 0 and scene.refused


def test_without_a_key_the_first_frame_comes_whole_and_small(make: Callable[..., Scene]) -> None:
    scene = make(Door("a"))
    scene.client(INSPECT)
    slow = scene.client(INSPECT[:10])
    large = scene.client(Header(Kind.HELLO, length=1 << 20).pack())
    scene.turn()
    assert len(scene.proved) == 1 and isinstance(scene.proved[0][1], FirstFrame)
    assert b"announces 1048576 bytes" in large.recv(4096)
    slow.sendall(INSPECT[10:])
    scene.turn()
    assert len(scene.proved) == 2 and len(scene.entrance) == 0


def test_descriptors_that_the_server_needs_itself_are_left(make: Callable[..., Scene]) -> None:
    probe = os.open("/dev/null", os.O_RDONLY)
    os.close(probe)
    scene = make(Door("a", KEY), Limits(1000, probe + 40))
    clients = [scene.client() for _ in range(50)]
    scene.turn()
    assert all(each.sock.fileno() < probe + 40 for each in scene.entrance._candidates)
    assert any(is_closed(sock) for sock in clients) and scene.refused


def test_no_descriptor_left_is_survived_and_tried_again(make: Callable[..., Scene]) -> None:
    scene = make(Door("a", KEY))
    client = scene.client(b"P")
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(client.fileno())
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, former[1]))
    try:
        scene.turn()
        assert not scene.selector.select(0.0), "the event loop would turn for nothing"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)
    scene.entrance._sweep_at_s = 0.0
    scene.turn()
    scene.turn()
    assert len(scene.entrance) == 1


@needs_root
@pytest.mark.parametrize("key", [KEY, None])
def test_another_user_of_the_machine_is_not_let_in_whatever_it_says(
    make: Callable[..., Scene], key: bytes | None
) -> None:
    scene = make(Door("a", key))

    def knock() -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("\0" + scene.local)
            sock.sendall(INSPECT)
        return True

    assert as_another_user(knock)
    scene.turn()
    assert not scene.proved and len(scene.entrance) == 0 and len(scene.refused) == 1


@needs_root
def test_a_process_does_not_talk_to_a_local_socket_of_another_user(make: Callable[..., Scene]) -> None:
    """It uses TCP instead, where nothing listens in this test."""
    scene = make(Door("a"))

    def enters() -> bool:
        try:
            connect("127.0.0.1:1", scene.local, host_identity(), 1.0, Door("a"), Role.WORKER).close()
        except Exception as error:
            return "cannot reach the server at 127.0.0.1:1" not in str(error)
        return True

    assert not as_another_user(enters)


def test_refusals_are_counted_each_and_told_once_a_second(capfd: pytest.CaptureFixture[str]) -> None:
    now, counted = [0.0], []
    refusals = Refusals(lambda: counted.append(1), lambda: now[0])
    for _ in range(100):
        refusals.note("a peer", "why")
    now[0] = 1.5
    refusals.tell()
    refusals.tell()
    assert len(counted) == 100
    told = [line for line in "".join(capfd.readouterr()).splitlines() if "refused a peer" in line]
    assert len(told) == 2 and "99" in told[1]


class TestSupervisor:
    """Its socket takes what processes of its user say, and passes over all else."""

    def read_all(self, sock: socket.socket) -> list[dict[str, object]]:
        found = []
        while (document := read_announcement(sock)) is not None:
            found.append(document)
        return found

    def test_what_is_no_announcement_is_passed_over(self, tmp_path: Path) -> None:
        path = tmp_path / "supervisor"
        with listen_announcements(path) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            for data in (b"", b"{", b"[1]", b"\xff" * 10, b"[" * 60_000, b'"' + b"x" * 100_000 + b'"'):
                sock.sendto(data, str(path))
            announce(path, {"event": "job", "job": "a"})
            assert self.read_all(listener) == [{}] * 6 + [{"event": "job", "job": "a"}]

    @needs_root
    def test_another_user_says_nothing_to_it(self, tmp_path: Path) -> None:
        path = Path(f"/tmp/psa-test-{secrets.token_hex(8)}")  # which another user reaches
        with listen_announcements(path) as listener:
            path.chmod(0o777)

            def say() -> bool:
                announce(path, {"event": "job", "job": "a"})
                return True

            assert as_another_user(say)
            assert self.read_all(listener) == [{}]
        path.unlink()
