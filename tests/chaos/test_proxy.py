"""The proxy does to connections what it is told, undoes it, and leaves neither threads nor descriptors."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from chaos.proxy import Proxy

PATIENCE_S = 120.0


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(client: socket.socket) -> None:
        with client:
            while data := client.recv(1 << 16):
                client.sendall(data)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(client,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    yield listener.getsockname()[:2]
    listener.shutdown(socket.SHUT_RDWR)
    accepting.join()
    listener.close()
    for thread in threads:
        thread.join()


@pytest.fixture
def proxy(echo: tuple[str, int]) -> Iterator[Proxy]:
    with closing(Proxy(echo)) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_S)


def exchange(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    answer = b""
    while len(answer) < len(data) and (piece := client.recv(1 << 16)):
        answer += piece
    return answer


def test_it_passes_everything_and_counts_it(proxy: Proxy) -> None:
    data = os.urandom(1 << 20)
    with connect(proxy) as client:
        client.settimeout(PATIENCE_S)
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        answer = b""
        while len(answer) < len(data):
            answer += client.recv(1 << 16)
        sender.join()
    assert answer == data
    assert proxy.passed_bytes == 2 * len(data)


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_an_answer_is_torn_at_its_byte_once(proxy: Proxy, at: int) -> None:
    proxy.cut_replies_after(at)
    with connect(proxy) as client:
        assert exchange(client, b"0123456789") == b"0123456789"[:at]
    assert proxy.fired == 1
    with connect(proxy) as client:
        assert exchange(client, b"again") == b"again"


def test_a_torn_request_never_arrives_whole(proxy: Proxy) -> None:
    proxy.cut_requests_after(4)
    with connect(proxy) as client:
        assert exchange(client, b"0123456789") in (b"0123", b"")  # its answer may be cut with it
    assert proxy.fired == 1


def test_delay_and_throttle_take_their_time_and_lose_nothing(proxy: Proxy) -> None:
    with connect(proxy) as client:
        for slow, least_s in ((lambda: proxy.delay(0.1), 0.2), (lambda: proxy.throttle(10_000), 0.2)):
            slow()
            begun_s = time.monotonic()
            assert exchange(client, b"x" * 1000) == b"x" * 1000
            assert time.monotonic() - begun_s >= least_s
        proxy.pass_all()
        assert exchange(client, b"y") == b"y"


def test_a_stall_ends_no_connection(proxy: Proxy) -> None:
    with connect(proxy) as client:
        proxy.stall()
        client.sendall(b"held")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(10)
        proxy.pass_all()
        client.settimeout(PATIENCE_S)
        assert client.recv(10) == b"held"


def test_refusing_ends_connections_old_and_new(proxy: Proxy) -> None:
    with connect(proxy) as client:
        assert exchange(client, b"x") == b"x"
        proxy.refuse()
        assert client.recv(10) == b""
    with connect(proxy) as client:
        assert client.recv(10) == b""
    proxy.pass_all()
    with connect(proxy) as client:
        assert exchange(client, b"x") == b"x"


def test_a_target_that_is_down_closes_the_client_and_is_found_when_it_is_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = listener.getsockname()[:2]
    with closing(Proxy(target)) as proxy:
        with connect(proxy) as client:
            assert client.recv(10) == b""
        with socket.create_server(target) as listener, connect(proxy) as client:
            listener.settimeout(PATIENCE_S)
            server, _ = listener.accept()
            with server:
                server.sendall(b"back")
                assert client.recv(10) == b"back"


def test_closing_ends_all_threads_and_descriptors(echo: tuple[str, int]) -> None:
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    proxy = Proxy(echo)
    clients = [connect(proxy) for _ in range(5)]
    assert all(exchange(client, b"x") == b"x" for client in clients)
    proxy.stall()
    proxy.close()
    for client in clients:
        client.close()
    deadline_s = time.monotonic() + PATIENCE_S
    # The echo server's own ends go a moment after ours.
    while (threading.active_count(), len(os.listdir("/proc/self/fd"))) != (threads, files):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
