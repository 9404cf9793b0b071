"""A Kazoo client that tries again without end in the background and never in the foreground.

All that depends on the inside of Kazoo is in this file: it names Kazoo's threads, limits how long one attempt to
connect may take, can abandon a connection that hangs, keeps the session timeout that the server granted, which Kazoo
itself forgets, and finds back to a ZooKeeper that has lost its data. Only ``session.py`` may use the client; the
four-letter words, which need none, are for ``examination.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from kazoo.client import KazooClient
from kazoo.handlers.threading import SequentialThreadingHandler
from kazoo.protocol.connection import ConnectionHandler
from kazoo.protocol.serialization import Connect
from kazoo.protocol.states import KeeperState
from kazoo.retry import KazooRetry
from kazoo.security import ACL, make_digest_acl

from psa_store.coordination.access import Access

_RECONNECT_DELAY_S = 0.05
_RECONNECT_DELAY_MAX_S = 0.25
_RECONNECT_JITTER = 0.2  # of the delay: at most 0.3 s in all
_ABANDON_AGAIN_S = 0.05
_ANSWER_BYTES_MAX = 1 << 16


class Client(KazooClient):  # type: ignore[misc]
    """``attempt_s``: limit of one attempt to open a TCP connection."""

    def __init__(self, access: Access, session_timeout_s: float, attempt_s: float) -> None:
        self._carrier = _Carrier(attempt_s)
        tls = access.tls
        super().__init__(
            hosts=access.hosts,
            auth_data=[("digest", f"{access.user}:{access.password}")] if access.user else None,
            default_acl=_acl(access),
            use_ssl=tls is not None,
            check_hostname=tls is not None,
            ca=tls and tls.ca,
            certfile=tls and tls.cert,
            keyfile=tls and (tls.key or tls.cert),
            timeout=session_timeout_s,
            handler=self._carrier,
            connection_retry=KazooRetry(
                max_tries=-1,
                delay=_RECONNECT_DELAY_S,
                max_delay=_RECONNECT_DELAY_MAX_S,
                max_jitter=_RECONNECT_JITTER,
            ),
            command_retry=KazooRetry(max_tries=1),
            logger=logging.Logger(__name__, logging.CRITICAL),
        )
        self._connection = _Connection(self, self._conn_retry.copy(), logger=self.logger)
        self._cut_off_at_s: float | None = None
        self.granted_s = session_timeout_s
        """Session timeout that the server granted; until one has answered, what we ask for."""

    @property
    def peer(self) -> str | None:
        """Address of the ZooKeeper server that we last connected to."""
        return self._carrier.peer

    @property
    def problem(self) -> str:
        """Why the newest attempt at TLS failed; empty if none did."""
        return self._carrier.problem

    @property
    def refused(self) -> bool:
        """Whether ZooKeeper does not take our credentials: then this client never connects again."""
        return bool(self._state == KeeperState.AUTH_FAILED)

    @property
    def outlived(self) -> bool:
        """Whether we have been without a connection for longer than a session lasts."""
        return self._cut_off_at_s is not None and time.monotonic() - self._cut_off_at_s > self.granted_s

    def _session_callback(self, state: str) -> None:
        if state in (KeeperState.CONNECTED, KeeperState.CONNECTED_RO):
            self._cut_off_at_s = None
        elif self._cut_off_at_s is None:
            self._cut_off_at_s = time.monotonic()
        super()._session_callback(state)

    def finish(self, patience_s: float) -> None:
        """End the session, or abandon it if ZooKeeper does not answer in ``patience_s``; join Kazoo's threads."""
        finished = threading.Event()
        abandon = threading.Thread(target=self._abandon, args=(finished, patience_s), name="psa-zookeeper-abandon")
        abandon.start()
        try:
            self.stop()
            self.close()
        finally:
            finished.set()
            abandon.join()

    def _abandon(self, finished: threading.Event, patience_s: float) -> None:
        """More than once: Kazoo may just be opening the connection on which it would wait for an answer."""
        while not finished.wait(patience_s):
            self._carrier.abandon()
            patience_s = _ABANDON_AGAIN_S


class _Carrier(SequentialThreadingHandler):  # type: ignore[misc]
    """Kazoo's maker of threads and sockets, with names and limits."""

    def __init__(self, attempt_s: float) -> None:
        super().__init__()
        self._attempt_s = attempt_s
        self._numbers = itertools.count()
        self._socket: socket.socket | None = None
        self.peer: str | None = None
        self.problem = ""

    def spawn(self, func: Callable[..., object], *args: Any, **kwargs: Any) -> threading.Thread:
        name = f"psa-zookeeper-{next(self._numbers)}"
        thread = threading.Thread(target=func, args=args, kwargs=kwargs, name=name, daemon=True)
        thread.start()
        return thread

    def create_connection(self, *args: Any, **kwargs: Any) -> socket.socket:
        kwargs["timeout"] = min(self._attempt_s, kwargs.get("timeout") or self._attempt_s)
        try:
            connected: socket.socket = super().create_connection(*args, **kwargs)
        except ssl.SSLError as error:
            self.problem = f"TLS: {error.reason or error}"
            raise
        self._socket = connected
        self.problem = ""
        self.peer = "{}:{}".format(*connected.getpeername()[:2])
        return connected

    def abandon(self) -> None:
        """Break the present connection; Kazoo notices at once, whatever it was waiting for."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed already
                self._socket.shutdown(socket.SHUT_RDWR)


class _Connection(ConnectionHandler):  # type: ignore[misc]
    """Kazoo's connection, which notes what timeout was granted before its client reports the session.

    A ZooKeeper server turns away clients that have seen a later transaction than itself, without a word. It will catch
    up, unless it is one of an ensemble that was restored from a backup or lost its data: then we would try for ever.
    Once our session is over in any case, we no longer insist: the answer is that it has expired, and a new one begins.
    """

    client: Client

    def _invoke(self, timeout: float, request: Any, xid: int | None = None) -> Any:
        if isinstance(request, Connect) and self.client.outlived:
            request = request._replace(last_zxid_seen=0)
        answer = super()._invoke(timeout, request, xid)
        if isinstance(request, Connect) and answer[0].time_out > 0:
            self.client.granted_s = answer[0].time_out / 1000.0
        return answer


def _acl(access: Access) -> list[ACL] | None:
    """All rights for our user, none for others; None: what is created is open to all."""
    return [make_digest_acl(access.user, access.password, all=True)] if access.user else None


def four_letters(address: tuple[str, int], word: bytes, timeout_s: float, tls: ssl.SSLContext | None = None) -> str:
    """Say one of ZooKeeper's four-letter words to a server; what it says until it hangs up, or is silent so long.

    Raises:
        OSError: there is no connection.
    """
    answer = b""
    with ExitStack() as stack:
        sock = stack.enter_context(socket.create_connection(address, timeout=timeout_s))
        if tls is not None:
            sock = stack.enter_context(tls.wrap_socket(sock, server_hostname=address[0]))
        end_s = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):
            sock.sendall(word)
            while len(answer) < _ANSWER_BYTES_MAX and (part := sock.recv(4096)):
                answer += part
                sock.settimeout(max(0.001, end_s - time.monotonic()))
    return answer.decode(errors="replace")
