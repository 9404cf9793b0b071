"""TLS between hosts: certificates of both sides, frames as they were sent, and words for what does not fit."""

from __future__ import annotations

import random
import select
import selectors
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from psa_store.config import Settings
from psa_store.errors import Disconnected, Unproved, UsageError
from psa_store.server.entrance import Candidate, Entrance, Limits
from psa_store.server.refusals import Refusals
from psa_store.wire import DISCARD, Connection, Door, Header, Kind, Role, Tls, Traffic, connect, listen_tcp
from psa_store.wire import connection as connection_module
from psa_store.wire import tls as tls_module
from psa_store.wire.frames import HEADER_BYTES
from tests.harness import PATIENCE_S

KEY = b"a key of the cluster"
RECORD_BYTES = 1 << 14


def authority(folder: Path) -> Tls:
    """Certificates of an authority of its own; its files lie in ``folder``."""
    folder.mkdir()
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*made, "-days", "2", "-subj", "/CN=psa-test", *files], check=True, capture_output=True)
    return Tls(folder / "cert.pem", folder / "key.pem", folder / "cert.pem")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return authority(tmp_path_factory.mktemp("tls") / "theirs")


class Server:
    """An entrance at a TCP port, in a thread of its own until ``until`` is true."""

    def __init__(self, door: Door) -> None:
        self.proved: list[socket.socket] = []
        self.refused: list[str] = []
        self._selector = selectors.DefaultSelector()
        listener, self.address = listen_tcp("127.0.0.1")
        refusals = Refusals(lambda: None)
        refusals.note = lambda peer, why, member="": self.refused.append(why)  # type: ignore[method-assign]
        self._entrance = Entrance(
            [listener], self._selector, door, Limits(10, 1 << 20), refusals, lambda sock, *_: self.proved.append(sock)
        )
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-server")
        self._thread.start()

    def _run(self) -> None:
        while not self._done.is_set():
            for key, _ in self._selector.select(0.02):
                if isinstance(key.data, Candidate):
                    self._entrance.serve(key.data)
                else:
                    self._entrance.accept(key.data)
            self._entrance.sweep()

    def take_over(self) -> socket.socket:
        """The socket whose peer has proved the key, as soon as there is one."""
        while not self.proved:
            threading.Event().wait(0.01)
        return self.proved[0]

    def refusal(self) -> str:
        """Why a peer is refused, as soon as one is."""
        while not self.refused:
            threading.Event().wait(0.01)
        return self.refused[0]

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self._entrance.close()
        self._selector.close()
        for sock in self.proved:
            sock.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Door], Server]]:
    with ExitStack() as kept:

        def of(door: Door) -> Server:
            server = Server(door)
            kept.callback(server.close)
            return server

        yield of


def enter(server: Server, door: Door) -> socket.socket:
    return connect(server.address, "", "", PATIENCE_S, door, Role.WORKER)


def test_frames_come_as_they_were_sent_in_both_directions(serve: Callable[[Door], Server], tls: Tls) -> None:
    server = serve(Door("a", KEY, tls))
    ours = enter(server, Door("a", KEY, tls))
    ends = [
        Connection(sock, "peer", lambda _connection, header: memoryview(bytearray(header.length)))
        for sock in (ours, server.take_over())
    ]
    rng = random.Random(16)
    sizes = [0, 0, 0, 1, 100, 20_000, 0, 300_000, 16_384, 0, 5_000_000, 7] * 3
    sent = [(Header(Kind.PUSH, step=number, length=size), rng.randbytes(size)) for number, size in enumerate(sizes)]
    with selectors.DefaultSelector() as selector:
        for end in ends:
            for header, payload in sent:
                end.send(header, payload)
            selector.register(end, selectors.EVENT_READ | selectors.EVENT_WRITE, [])
        while any(end.sending for end in ends):
            for key, mask in selector.select(PATIENCE_S):
                assert isinstance(key.fileobj, Connection)
                if mask & selectors.EVENT_WRITE:
                    key.fileobj.flush()
                if mask & selectors.EVENT_READ:
                    key.data.extend((header, bytes(payload)) for header, payload in key.fileobj.receive())
        for end in ends:
            selector.modify(end, selectors.EVENT_READ, selector.get_key(end).data)
        # What TLS holds does not show in the selector: a call of receive must have taken all of it.
        while any(len(selector.get_key(end).data) < len(sent) for end in ends):
            events = selector.select(5.0)
            assert events, "frames are held back"
            for key, _ in events:
                assert isinstance(key.fileobj, Connection)
                key.data.extend((header, bytes(payload)) for header, payload in key.fileobj.receive())
        assert all(selector.get_key(end).data == sent for end in ends)
    for end in ends:
        end.close()


def test_a_peer_that_sends_without_end_does_not_hold_the_event_loop(
    serve: Callable[[Door], Server], tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frames end in the middle of TLS's records, so there is always a rest that the socket does not show."""
    monkeypatch.setattr(tls_module, "_CHUNK_BYTES", 2 * RECORD_BYTES)
    monkeypatch.setattr(connection_module, "_READ_ROUNDS_MAX", 2)
    server = serve(Door("a", KEY, tls))
    ours = Connection(enter(server, Door("a", KEY, tls)), "peer", lambda *_: DISCARD)
    traffic = Traffic()
    theirs = Connection(server.take_over(), "peer", lambda *_: DISCARD, traffic)
    with closing(ours), closing(theirs):
        ours.send(Header(Kind.PUSH, length=1 << 24), bytes(1 << 24))
        ours.flush()
        select.select([theirs], [], [], PATIENCE_S)
        assert list(theirs.receive()) == []
        assert HEADER_BYTES < traffic.received_bytes <= HEADER_BYTES + 3 * RECORD_BYTES


def test_a_certificate_of_another_authority_is_refused_on_both_sides(
    serve: Callable[[Door], Server], tls: Tls, another: Tls
) -> None:
    server = serve(Door("a", KEY, tls))
    with pytest.raises(Unproved, match="PSA_TLS_CA"):
        enter(server, Door("a", KEY, another))
    assert not server.proved


def test_a_peer_without_tls_is_told(serve: Callable[[Door], Server], tls: Tls) -> None:
    server = serve(Door("a", KEY, tls))
    with pytest.raises(Disconnected, match=r"the server speaks TLS: set PSA_TLS_CERT|closed the connection"):
        enter(server, Door("a", KEY))
    assert not server.proved and "no TLS" in server.refusal()


def test_a_server_without_tls_is_named(serve: Callable[[Door], Server], tls: Tls) -> None:
    server = serve(Door("a", KEY))
    with pytest.raises(Disconnected, match="PSA_TLS_CERT"):
        enter(server, Door("a", KEY, tls))
    assert not server.proved


def test_the_key_is_wanted_within_tls_too(serve: Callable[[Door], Server], tls: Tls) -> None:
    server = serve(Door("a", KEY, tls))
    with pytest.raises(Unproved, match="another key"):
        enter(server, Door("a", b"another key that is", tls))
    assert not server.proved


def test_all_three_files_are_named_or_none(tmp_path: Path, another: Tls) -> None:
    with pytest.raises(UsageError, match="set all of them, or none"):
        Door.from_settings(Settings(tls_cert=tmp_path / "cert.pem"), "a")
    none = Settings(tls_cert=tmp_path / "a", tls_key=tmp_path / "b", tls_ca=tmp_path / "c")
    with pytest.raises(UsageError, match="No such file"):
        Door.from_settings(none, "a")
