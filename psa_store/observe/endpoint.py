"""A small HTTP server in every process: read-only, and bounded in threads, connections and time.

One thread accepts, a few answer. A connection carries one request and ends within a few seconds, whatever its client
does; when too many are open, new ones are closed unanswered. So a storm of scrapes costs a client its answer, and the
process nothing.
"""

from __future__ import annotations

import contextlib
import errno
import math
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import Any

from psa_store import logs
from psa_store.errors import PsaError
from psa_store.wire import Mailbox, listen_tcp

Answer = tuple[int, str, bytes]
"""Status, content type, body."""
Route = Callable[[], Answer]
"""Answers a request. Called by several threads; must not wait for long."""
TEXT = "text/plain; charset=utf-8"

_PORTS_TRIED = 100
_THREADS = 4
_CONNECTIONS_MAX = 32
_CONNECTION_S = 5.0
_PAUSE_S = 1.0
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Endpoint:
    """Serves ``routes``, by path, on ``host``. Owns the thread ``psa-http`` and a few named after it.

    Args:
        port: 0 for a free one; else this one, or the next that is free within 100 above.

    Raises:
        DependencyUnreachable: there is no such address or port.
    """

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        ports = range(port, min(port + _PORTS_TRIED, 1 << 16)) if port else (0,)
        self._listener, self.address = listen_tcp(host, ports)
        self._routes = dict(routes)
        self._closing: Mailbox[None] = Mailbox()
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        """Connections, and when each must end, by a monotonic clock: that begins when its turn has come."""
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="psa-http")
        # Made here, not by the thread, which may come to run when there are no descriptors left.
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._listener)
        self._selector.register(self._closing.fileno(), selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="psa-http")
        self._thread.start()

    def close(self) -> None:
        """Stop answering; every thread and socket is gone afterwards."""
        self._closing.post(None)
        self._thread.join()
        self._selector.close()
        self._listener.close()
        self._end_connections(due_at_s=math.inf)
        self._pool.shutdown()
        self._closing.close()

    def _run(self) -> None:
        listening = True
        while True:
            # An idle endpoint does not wake up at all.
            events = self._selector.select(_PAUSE_S if self._open or not listening else None)
            if any(key.data is None for key, _ in events):
                return
            self._end_connections(due_at_s=time.monotonic())
            if not listening:
                self._selector.register(self._listener, selectors.EVENT_READ, self._listener)
                listening = True
            elif events and not self._accept():
                self._selector.unregister(self._listener)
                listening = False

    def _accept(self) -> bool:
        """Take a connection; False if there are no descriptors for it: it stays in the queue."""
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            return error.errno not in _EXHAUSTED  # else the client is gone again
        with self._lock:
            room = len(self._open) < _CONNECTIONS_MAX
            if room:
                self._open[sock] = math.inf
        if room:
            self._pool.submit(self._answer, sock, address).add_done_callback(_log_bug)
        else:
            sock.close()
        return True

    def _end_connections(self, due_at_s: float) -> None:
        """Cut off those whose time is over; the thread that answers them closes them."""
        with self._lock:
            for sock, end_s in self._open.items():
                if end_s <= due_at_s:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    def _answer(self, sock: socket.socket, address: Any) -> None:
        with self._lock:
            self._open[sock] = time.monotonic() + _CONNECTION_S
        try:
            sock.settimeout(_CONNECTION_S)
            _Handler(self._routes, sock, address)
        except OSError as error:
            logs.get_logger().debug("an HTTP client is gone", client=str(address), why=str(error))
        finally:
            with self._lock:
                del self._open[sock]
            sock.close()


def _log_bug(answered: Future[None]) -> None:
    if (error := answered.exception()) is not None:
        logs.get_logger().error("a page failed", exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0, so the connection ends with the answer."""

    server_version = "psa_store"
    sys_version = ""

    def __init__(self, routes: Mapping[str, Route], sock: socket.socket, address: Any) -> None:
        self._routes = routes
        super().__init__(sock, address, None)  # type: ignore[arg-type]  # it has no use for a server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        route = self._routes.get(path)
        if route is None:
            known = " ".join(sorted(self._routes))
            status, content_type, body = 404, TEXT, f"no {path}; there are: {known}\n".encode()
        else:
            try:
                status, content_type, body = route()
            except PsaError as error:
                status, content_type, body = 503, TEXT, f"{error}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: requests are not worth a log line."""
