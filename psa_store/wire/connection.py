"""One connection: moves frames over a non-blocking socket, without copies, for a caller that owns the event loop.

The caller brings an *admit* function that is asked, with the header in hand and before the first byte of the payload
is read, where the payload belongs. It answers with memory of exactly ``header.length`` bytes (a tensor's own), with
:data:`PARK` (not now: nothing more is read until :meth:`Connection.resume`, which is back-pressure), or it raises
``Refused`` (the peer is broken: the connection cannot go on).

Not thread-safe: one thread, the one of the event loop, calls everything.
"""

from __future__ import annotations

import contextlib
import enum
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from psa_store.errors import Disconnected, Refused
from psa_store.wire.frames import HEADER_BYTES, Header, unpack

_GATHER_MAX = 64
_SOCKET_BUFFER_BYTES = 4 << 20
_READ_ROUNDS_MAX = 16
"""Socket reads per call of :meth:`Connection.receive`, so that one fast peer cannot starve the others."""


class Park(enum.Enum):
    PARK = "park"


PARK: Final = Park.PARK
Admit = Callable[["Connection", Header], memoryview | Park]


class Connection:
    """A framed, non-blocking connection. ``peer`` is for messages; ``member`` is set by whoever checks HELLO."""

    def __init__(self, sock: socket.socket, peer: str, admit: Admit) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        self._sock = sock
        self._admit = admit
        self.peer = peer
        self.member = ""
        self._outgoing: deque[memoryview] = deque()
        self._header_bytes = bytearray(HEADER_BYTES)
        self._filled = 0
        self._header: Header | None = None
        self._payload: memoryview | None = None
        self.parked = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._outgoing.clear()
        self._sock.close()

    # --- sending

    @property
    def sending(self) -> bool:
        """True while bytes wait for the socket to take them."""
        return bool(self._outgoing)

    def send(self, header: Header, payload: memoryview | bytes = b"") -> None:
        """Queue a frame. ``payload`` must not change until it is sent: see :meth:`detach`."""
        self._outgoing.append(memoryview(header.pack()))
        if header.length:
            self._outgoing.append(memoryview(payload).cast("B"))

    def flush(self) -> None:
        """Send as much as the socket takes now; raises Disconnected if the peer is gone."""
        while self._outgoing:
            views = [view for view, _ in zip(self._outgoing, range(_GATHER_MAX), strict=False)]
            try:
                sent = self._sock.sendmsg(views)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise Disconnected(f"lost {self.peer} while sending: {error}") from error
            while sent:
                first = self._outgoing[0]
                if sent < len(first):
                    self._outgoing[0] = first[sent:]
                    break
                sent -= len(first)
                self._outgoing.popleft()

    def detach(self) -> None:
        """Copy what is still unsent, so that the memory it came from may change."""
        self._outgoing = deque(memoryview(bytes(view)) for view in self._outgoing)

    # --- receiving

    def receive(self) -> Iterator[tuple[Header, memoryview]]:
        """Yield the frames that are complete by now; raises Disconnected or Refused."""
        for _ in range(_READ_ROUNDS_MAX):
            if self.parked:
                return
            frame_done = self._read_some()
            if frame_done is None:
                return
            if frame_done:
                assert self._header is not None and self._payload is not None
                frame = self._header, self._payload
                self._header, self._payload, self._filled = None, None, 0
                yield frame

    def resume(self) -> None:
        """Ask *admit* again about the frame for which it answered PARK."""
        if self.parked:
            self.parked = False
            assert self._header is not None
            self._place(self._header)

    def divert(self, scratch: memoryview) -> None:
        """Let the rest of the payload that is arriving go to ``scratch``: its place is needed for another."""
        assert self._payload is not None
        self._payload = scratch[: len(self._payload)]

    def _read_some(self) -> bool | None:
        """One read. True: a frame is complete. False: there may be more to read. None: there is not."""
        if self._header is None:
            target = memoryview(self._header_bytes)[self._filled :]
        else:
            assert self._payload is not None
            target = self._payload[self._filled :]
        if len(target):
            try:
                count = self._sock.recv_into(target)
            except (BlockingIOError, InterruptedError):
                return None
            except OSError as error:
                raise Disconnected(f"lost {self.peer} while receiving: {error}") from error
            if count == 0:
                raise Disconnected(f"{self.peer} closed the connection")
            self._filled += count
            if count < len(target):
                return False
        if self._header is None:
            self._header = unpack(self._header_bytes)
            self._place(self._header)
            return not self.parked and self._header.length == 0
        return True

    def _place(self, header: Header) -> None:
        place = self._admit(self, header)
        if isinstance(place, Park):
            self.parked = True
            return
        if len(place) != header.length:
            raise Refused(f"{self.peer} sent {header.kind.name} of {header.length} bytes, expected {len(place)}")
        self._payload = place
        self._filled = 0


def _keep_alive(sock: socket.socket) -> None:
    """Notice a peer whose machine vanished within about 15 s, without a frame of our own."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)
