"""The HTTP endpoint, over real sockets: it answers, and no client can make it cost more than it may."""

from __future__ import annotations

import multiprocessing
import os
import resource
import select
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from email.message import Message
from http.client import HTTPConnection
from pathlib import Path

import pytest

from psa_store.errors import DependencyUnreachable
from psa_store.observe import Endpoint, endpoint

PATIENCE_S = 120.0


def get(address: str, path: str, method: str = "GET") -> tuple[int, str, bytes]:
    host, _, port = address.rpartition(":")
    with closing(HTTPConnection(host, int(port), timeout=PATIENCE_S)) as client:
        client.request(method, path)
        answer = client.getresponse()
        return answer.status, answer.headers.get("Content-Type", ""), answer.read()


def ask(address: str, path: str, **headers: str) -> tuple[int, Message]:
    host, _, port = address.rpartition(":")
    with closing(HTTPConnection(host, int(port), timeout=PATIENCE_S)) as client:
        client.putrequest("GET", path, skip_host=True)
        for name, value in headers.items():
            client.putheader(name, value)
        client.endheaders()
        answer = client.getresponse()
        return answer.status, answer.headers


def held() -> tuple[set[str], int]:
    """The threads of this process, and how many descriptors it has open, but for memory: tensors keep theirs."""
    folder = Path("/proc/self/fd")
    links = [os.readlink(path) for path in folder.iterdir() if path.is_symlink()]
    return {thread.name for thread in threading.enumerate()}, sum(not link.startswith("/memfd:") for link in links)


def tell_outage() -> tuple[int, str, bytes]:
    raise DependencyUnreachable("Redis is away")


ROUTES = {"/a": lambda: (200, "text/x", b"hello"), "/bad": lambda: (503, "text/plain", b"no"), "/outage": tell_outage}


@pytest.fixture
def server() -> Iterator[Endpoint]:
    before = held()
    with closing(Endpoint("127.0.0.1", 0, ROUTES)) as found:
        yield found
    assert held() == before


def test_it_answers_what_the_routes_say(server: Endpoint) -> None:
    assert get(server.address, "/a?x=1") == (200, "text/x", b"hello")
    assert get(server.address, "/bad") == (503, "text/plain", b"no")
    assert get(server.address, "/a", "HEAD") == (200, "text/x", b"")
    assert get(server.address, "/outage")[0] == 503 and b"Redis is away" in get(server.address, "/outage")[2]
    status, _, body = get(server.address, "/b")
    assert status == 404 and b"/a /bad" in body


def test_it_changes_nothing(server: Endpoint) -> None:
    assert get(server.address, "/a", "POST")[0] == 501


@pytest.mark.parametrize("rubbish", [b"\0" * 100, b"GET\n\n", b"GET /a HTTP/9.9\r\n\r\n", b"A" * 100_000])
def test_rubbish_is_answered_or_not_and_the_next_one_served(server: Endpoint, rubbish: bytes) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as client:
        client.sendall(rubbish)
        try:
            client.shutdown(socket.SHUT_WR)  # not if it has hung up by now
            while client.recv(4096):
                pass
        except OSError:
            pass
    assert get(server.address, "/a")[2] == b"hello"


def test_clients_that_say_nothing_are_cut_off_and_others_wait_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_CONNECTION_S", 1.0)
    before = held()
    with closing(Endpoint("127.0.0.1", 0, ROUTES)) as server, ExitStack() as stack:
        host, _, port = server.address.rpartition(":")
        for _ in range(endpoint._THREADS):
            silent = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
            stack.enter_context(closing(silent))
            silent.sendall(b"GET /a HT")
        begun_s = time.monotonic()
        assert get(server.address, "/a")[2] == b"hello"
        assert time.monotonic() - begun_s > 0.5, "no client was in the way: the test proves nothing"
    assert held() == before


def test_a_client_that_drips_does_not_last_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_CONNECTION_S", 1.0)
    pause = threading.Event()
    with closing(Endpoint("127.0.0.1", 0, ROUTES)) as server:
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as client:
            begun_s = time.monotonic()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                while time.monotonic() - begun_s < PATIENCE_S:
                    client.sendall(b"A")
                    pause.wait(0.05)
            assert time.monotonic() - begun_s < PATIENCE_S / 2


def test_a_storm_is_turned_away_and_passes(server: Endpoint) -> None:
    host, _, port = server.address.rpartition(":")
    with ExitStack() as stack:
        clients = [
            stack.enter_context(closing(socket.create_connection((host, int(port)), timeout=PATIENCE_S)))
            for _ in range(endpoint._CONNECTIONS_MAX + 8)
        ]
        kept = set(clients)
        while len(kept) > endpoint._CONNECTIONS_MAX:
            turned_away, _, _ = select.select(kept, [], [], PATIENCE_S)
            assert turned_away and all(client.recv(1) == b"" for client in turned_away)
            kept.difference_update(turned_away)
        assert not select.select(kept, [], [], 0.05)[0], "more were turned away than had to be"
        threads = [each for each in threading.enumerate() if each.name.startswith("psa-http")]
        assert len(threads) == 1 + endpoint._THREADS
    over_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < over_s:  # until it has noticed that they are gone
        with suppress(ConnectionError):
            assert get(server.address, "/a")[2] == b"hello"
            return
    raise AssertionError("no request is answered any more")


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Every descriptor of this process is taken."""
    limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def rest_without_descriptors() -> None:
    """In a process of its own, without other threads that are needed."""
    with closing(Endpoint("127.0.0.1", 0, ROUTES)) as server, closing(socket.socket()) as client:
        host, _, port = server.address.rpartition(":")
        client.settimeout(PATIENCE_S)
        with no_descriptors():
            client.connect((host, int(port)))
            client.sendall(b"GET /a HTTP/1.0\r\n\r\n")
            begun_s = time.process_time()
            threading.Event().wait(0.5)
            took_s = time.process_time() - begun_s
        assert took_s < 0.2, "it spins"
        assert client.recv(100).startswith(b"HTTP/1.0 200")


def test_out_of_descriptors_it_rests_and_answers_afterwards() -> None:
    child = multiprocessing.get_context("spawn").Process(target=rest_without_descriptors)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_the_second_process_takes_the_next_port() -> None:
    with closing(Endpoint("127.0.0.1", 0, ROUTES)) as first:
        port = int(first.address.rpartition(":")[2])
        with closing(Endpoint("127.0.0.1", port, ROUTES)) as second:
            assert port < int(second.address.rpartition(":")[2]) <= port + 100
            assert get(second.address, "/a")[2] == b"hello"


def test_closing_does_not_wait_for_a_silent_client() -> None:
    before = held()
    with closing(Endpoint("127.0.0.1", 0, ROUTES)) as server:
        host, _, port = server.address.rpartition(":")
        client = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        client.sendall(b"GET /a HT")
        assert get(server.address, "/a")[2] == b"hello"
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 1.0
    client.close()
    assert held() == before


def test_an_address_of_another_machine_is_refused_with_its_name() -> None:
    before = held()
    with pytest.raises(DependencyUnreachable, match=r"192\.0\.2\.1.*PSA_BIND"):
        Endpoint("192.0.2.1", 0, ROUTES)
    assert held() == before


def test_only_requests_that_were_sent_to_this_host_are_answered() -> None:
    """Others are of a page of another site whose name was made to come here."""
    with closing(Endpoint("127.0.0.1", 0, ROUTES, names=["psa.example"])) as server:
        port = server.address.rpartition(":")[2]
        for name in ("localhost", f"127.0.0.1:{port}", "[::1]", "10.1.2.3", "PSA.example:80", socket.gethostname()):
            assert ask(server.address, "/a", Host=name)[0] == 200, name
        for name in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "x@",
            "",
        ):
            assert ask(server.address, "/a", Host=name)[0] == 421, name
        assert ask(server.address, "/a")[0] == 200, "no browser"


def test_answers_are_framed_and_taken_for_other_kinds_by_no_browser(server: Endpoint) -> None:
    _, found = ask(server.address, "/a", Host="localhost")
    assert found["X-Content-Type-Options"] == "nosniff" and found["X-Frame-Options"] == "DENY"
    assert found["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert found["Referrer-Policy"] == "no-referrer"


def test_with_a_token_only_health_is_told_without_it() -> None:
    routes = {**ROUTES, "/healthz": ROUTES["/a"]}
    with closing(Endpoint("127.0.0.1", 0, routes, token="s3cret-token")) as server:
        status, found = ask(server.address, "/a")
        assert status == 401 and found["WWW-Authenticate"].startswith("Basic")
        assert ask(server.address, "/nowhere")[0] == 401
        assert ask(server.address, "/healthz")[0] == 200
        basic, wrong = (b64encode(f"me:{each}".encode()).decode() for each in ("s3cret-token", "other"))
        for right in ("Bearer s3cret-token", f"Basic {basic}"):
            assert ask(server.address, "/a", Authorization=right)[0] == 200
        for given in ("", "Bearer", "Bearer s3cret-toke", f"Basic {wrong}", "Basic ====", "s3cret-token\xff"):
            assert ask(server.address, "/a", Authorization=given)[0] == 401, given
