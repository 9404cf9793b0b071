"""A small HTTP server in every process: read-only, and bounded in threads, connections and time.

One thread accepts, a few answer. A connection carries one request and ends within a few seconds, whatever its client
does; when too many are open, new ones are closed unanswered. So a storm of scrapes costs a client its answer, and the
process nothing.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hmac
import ipaddress
import math
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from psa_store import logs
from psa_store.config.listening import is_any
from psa_store.errors import PsaError
from psa_store.logs import escaped
from psa_store.wire import Mailbox, host_port, listen_tcp

Answer = tuple[int, str, bytes]
"""Status, content type, body."""
Route = Callable[[], Answer]
"""Answers a request. Called by several threads; must not wait for long."""
TEXT = "text/plain; charset=utf-8"

_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""They say no more than whether a process is well, to what starts it again."""
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
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
        names: of this host, beside its own, by which a browser may ask.
        token: what a client has to show, but for the health of the process; None for nothing.
        advertised: the host to name to others, if it is not the one on which it listens.

    Raises:
        DependencyUnreachable: there is no such address or port.
    """

    def __init__(
        self,
        host: str,
        port: int,
        routes: Mapping[str, Route],
        *,
        names: Iterable[str] = (),
        token: str | None = None,
        advertised: str | None = None,
    ) -> None:
        ports = range(port, min(port + _PORTS_TRIED, 1 << 16)) if port else (0,)
        self._listener, _ = listen_tcp(host, ports)
        shown = advertised or (socket.gethostname() if is_any(host) else host)
        self.address = host_port(shown, self._listener.getsockname()[1])
        self._door = _Door(
            dict(routes),
            frozenset(name.lower() for name in ("localhost", socket.gethostname(), host, shown, *names)),
            None if token is None else token.encode(),
        )
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
            _Handler(self._door, sock, address)
        except OSError as error:
            logs.get_logger().debug("an HTTP client is gone", client=str(address), why=str(error))
        finally:
            with self._lock:
                del self._open[sock]
            sock.close()


def _log_bug(answered: Future[None]) -> None:
    if (error := answered.exception()) is not None:
        logs.get_logger().error("a page failed", exc_info=error)


@dataclass(frozen=True, slots=True)
class _Door:
    """What is answered, and to which requests."""

    routes: Mapping[str, Route]
    names: frozenset[str]
    token: bytes | None

    def is_ours(self, host: str | None) -> bool:
        """Whether a request that was sent to ``host`` was meant for us.

        A page of another site can have its name lead to our address, and then read what we answer to its own script.
        It cannot do so with an address, nor with a name that is not its own.
        """
        if host is None:
            return True  # no browser leaves it out
        name = re.sub(r":\d*$", "", host).strip("[]").lower().rstrip(".")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True

    def knows(self, path: str, authorization: str | None) -> bool:
        """Whether the client may read what is there."""
        if self.token is None or path in _OPEN_PATHS:
            return True
        kind, _, shown = (authorization or "").partition(" ")
        if kind.lower() == "basic":  # what a browser asks its user for
            with contextlib.suppress(ValueError):
                shown = base64.b64decode(shown, validate=True).decode().partition(":")[2]
        return hmac.compare_digest(shown.strip().encode(), self.token)


class _Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0, so the connection ends with the answer."""

    server_version = "psa_store"
    sys_version = ""

    def __init__(self, door: _Door, sock: socket.socket, address: Any) -> None:
        self._door = door
        super().__init__(sock, address, None)  # type: ignore[arg-type]  # it has no use for a server

    def do_GET(self) -> None:
        status, content_type, body = self._answer()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        # A page says in its text what else it allows itself; what is no page needs nothing.
        rest = "" if content_type.startswith("text/html") else "default-src 'none'; "
        self.send_header("Content-Security-Policy", f"{rest}frame-ancestors 'none'")
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="psa_store"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def _answer(self) -> Answer:
        path, host = self.path.partition("?")[0], self.headers.get("Host")
        if not self._door.is_ours(host):
            text = f"{escaped(host)} is no name of this host. PSA_HTTP_HOSTS adds names\n"
            return HTTPStatus.MISDIRECTED_REQUEST, TEXT, text.encode()
        if not self._door.knows(path, self.headers.get("Authorization")):
            return HTTPStatus.UNAUTHORIZED, TEXT, b"This needs the token (PSA_HTTP_TOKEN).\n"
        route = self._door.routes.get(path)
        if route is None:
            known = " ".join(sorted(self._door.routes))
            return HTTPStatus.NOT_FOUND, TEXT, f"no {escaped(path)}; there are: {known}\n".encode()
        try:
            return route()
        except PsaError as error:
            return HTTPStatus.SERVICE_UNAVAILABLE, TEXT, f"{escaped(str(error))}\n".encode()

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: requests are not worth a log line."""
