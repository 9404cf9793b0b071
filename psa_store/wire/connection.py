"""One connection: moves frames over a non-blocking socket, without copies, for a caller that owns the event loop.

The caller brings an *admit* function that is asked, with the header in hand and before the first byte of the payload
is read, where the payload belongs. It answers with memory of exactly ``header.length`` bytes (a tensor's own), with
:data:`PARK` (not now: nothing more is read until :meth:`Connection.resume`, which is back-pressure), with
:data:`DISCARD` (the frame is yielded with an empty payload, and no memory is taken for what comes), or it raises
``Refused`` (the peer is broken: the connection cannot go on).

Over a Unix socket a frame may bring a descriptor (:data:`~psa_store.wire.frames.WITH_DESCRIPTOR`). It comes with the
first byte of the frame's header, so only headers are read in the way that takes descriptors.

Not thread-safe: one thread, the one of the event loop, calls everything.
"""

from __future__ import annotations

import array
import contextlib
import enum
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice, takewhile
from typing import Final

from psa_store.errors import Disconnected, Refused
from psa_store.wire.frames import HEADER_BYTES, WITH_DESCRIPTOR, Header, unpack
from psa_store.wire.handshake import Role
from psa_store.wire.memory import Passable
from psa_store.wire.tls import TlsSocket

_GATHER_MAX = 64
_SOCKET_BUFFER_BYTES = 4 << 20
_READ_ROUNDS_MAX = 16
"""Socket reads per call of :meth:`Connection.receive`, so that one fast peer cannot starve the others."""
_OUTGOING_MAX = 128
"""Headers and payloads that wait for the socket before a connection counts as congested."""
_NOTHING = memoryview(b"")
_SINK = memoryview(bytearray(1 << 16))
"""Where all connections of the process receive what none of them keeps."""
_DESCRIPTOR_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(2 * _DESCRIPTOR_BYTES)
"""Room for one descriptor more than can rightly come, to notice it."""
_TRUNCATED = int(socket.MSG_CTRUNC)
"""A plain number: to compare with the enum costs as much as to receive."""


@dataclass(slots=True)
class Traffic:
    """Bytes that some connections have moved, one of their owner's for all that it ever had. Any thread may read."""

    sent_bytes: int = 0
    received_bytes: int = 0


class Park(enum.Enum):
    PARK = "park"


class Discard(enum.Enum):
    DISCARD = "discard"


PARK: Final = Park.PARK
DISCARD: Final = Discard.DISCARD
Place = memoryview | Park | Discard
Admit = Callable[["Connection", Header], Place]


class Connection:
    """A framed, non-blocking connection. ``peer`` is for messages; ``member`` is set when HELLO was checked.

    ``role``: what the peer has proved to be; None where there is no key.

    ``traffic``: where its bytes are counted.
    """

    def __init__(self, sock: socket.socket, peer: str, admit: Admit, traffic: Traffic | None = None) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)  # its buffers are the kernel's to tune: setting them turns that off
        else:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        self._sock = sock
        self._pending = sock.pending if isinstance(sock, TlsSocket) else _nothing_pending
        """Bytes that TLS has taken from the socket already, which therefore does not show them."""
        self._admit = admit
        self._traffic = traffic or Traffic()
        self.peer = peer
        self.member = ""
        self.role: Role | None = None
        self.is_local = sock.family == socket.AF_UNIX
        self._outgoing: deque[tuple[memoryview, Passable | None]] = deque()
        self._descriptor: int | None = None
        self._header_bytes = bytearray(HEADER_BYTES)
        self._filled = 0
        self._header: Header | None = None
        self._payload: memoryview | None = None
        self._unwanted_bytes = 0
        self.parked = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._outgoing.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._sock.close()

    def wait_for_slow_reader(self) -> None:
        """Wait without limit for a peer that lives and does not read. One that is cut off makes a new connection."""
        if not self.is_local and hasattr(socket, "TCP_USER_TIMEOUT"):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)

    # --- sending

    @property
    def sending(self) -> bool:
        """True while bytes wait for the socket to take them."""
        return bool(self._outgoing)

    @property
    def congested(self) -> bool:
        """True while so much waits for a peer that does not read that no more of its requests should be read."""
        return len(self._outgoing) > _OUTGOING_MAX

    def send(self, header: Header, payload: memoryview | bytes = b"", memory: Passable | None = None) -> None:
        """Queue a frame. ``payload`` must not change until it is sent: see :meth:`detach`.

        ``memory``: pass its descriptor along; only where :attr:`is_local`.
        """
        assert memory is None or (self.is_local and header.kind in WITH_DESCRIPTOR)
        self._outgoing.append((memoryview(header.pack()), memory))
        if header.length:
            self._outgoing.append((memoryview(payload).cast("B"), None))

    def send_now(self, header: Header, payload: memoryview | bytes = b"", memory: Passable | None = None) -> bool:
        """Queue a frame and send as much as the socket takes now; True if bytes wait for it. Raises Disconnected."""
        if not header.length and memory is None and not self._outgoing:
            whole = header.pack()
            try:
                sent = self._sock.send(whole)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                raise Disconnected(f"lost {self.peer} while sending: {error}") from error
            self._traffic.sent_bytes += sent
            if sent < len(whole):
                self._outgoing.append((memoryview(whole)[sent:], None))
        else:
            self.send(header, payload, memory)
            self.flush()
        return bool(self._outgoing)

    def flush(self) -> None:
        """Send as much as the socket takes now; raises Disconnected if the peer is gone."""
        while self._outgoing:
            try:
                sent = self._send_some()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise Disconnected(f"lost {self.peer} while sending: {error}") from error
            self._traffic.sent_bytes += sent
            while sent:
                first, _ = self._outgoing[0]
                if sent < len(first):
                    self._outgoing[0] = first[sent:], None
                    break
                sent -= len(first)
                self._outgoing.popleft()

    def _send_some(self) -> int:
        """One call of sendmsg: up to the next header that brings a descriptor, or that one alone."""
        first, memory = self._outgoing[0]
        if memory is not None:
            rights = array.array("i", [memory.fd])
            return self._sock.sendmsg([first], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        ready = takewhile(lambda part: part[1] is None, islice(self._outgoing, _GATHER_MAX))
        return self._sock.sendmsg([view for view, _ in ready])

    def detach(self) -> None:
        """Copy what is still unsent, so that the memory it came from may change."""
        self._outgoing = deque(
            (view if view.readonly else memoryview(bytes(view)), memory) for view, memory in self._outgoing
        )

    # --- receiving

    def receive(self) -> Iterator[tuple[Header, memoryview]]:
        """Yield the frames that are complete by now; raises Disconnected or Refused."""
        for turn in count():
            # In the end only what TLS has taken from the socket, which does not show it: one record at most.
            limit = None if turn < _READ_ROUNDS_MAX else self._pending()
            if self.parked or limit == 0:
                return
            frame_done = self._read_some(limit)
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
            self._take_place(self._header, self._admit(self, self._header))

    def divert(self) -> None:
        """Discard the rest of the payload that is arriving: its place is needed for another."""
        assert self._payload is not None and not self._unwanted_bytes
        self._payload, self._unwanted_bytes = _NOTHING, len(self._payload) - self._filled

    def _read_some(self, limit: int | None) -> bool | None:
        """One read, of ``limit`` bytes at most.

        True: a frame is complete. False: there may be more to read. None: there is not.
        """
        if self._header is None:
            target = memoryview(self._header_bytes)[self._filled :]
        elif self._unwanted_bytes:
            target = _SINK[: self._unwanted_bytes]
        else:
            assert self._payload is not None
            target = self._payload[self._filled :]
        if len(target):
            try:
                part = target if limit is None else target[:limit]
                count = self._receive_header(part) if self._header is None else self._sock.recv_into(part)
            except (BlockingIOError, InterruptedError):
                return None
            except OSError as error:
                raise Disconnected(f"lost {self.peer} while receiving: {error}") from error
            if count == 0:
                raise Disconnected(f"{self.peer} closed the connection")
            self._traffic.received_bytes += count
            if self._unwanted_bytes:
                self._unwanted_bytes -= count
                return not self._unwanted_bytes
            self._filled += count
            if count < len(target):
                return False
        if self._header is None:
            self._header = unpack(self._header_bytes)
            if self._descriptor is not None and self._header.kind not in WITH_DESCRIPTOR:
                raise Refused(f"{self.peer} passed a descriptor with {self._header.kind.name}")
            self._take_place(self._header, self._admit(self, self._header))
            return not self.parked and self._header.length == 0
        return True

    def take_descriptor(self) -> int | None:
        """The descriptor that came with the frame at hand; the caller owns it now."""
        descriptor, self._descriptor = self._descriptor, None
        return descriptor

    def _receive_header(self, target: memoryview) -> int:
        if not self.is_local:
            return self._sock.recv_into(target)
        count, ancillary, flags, _ = self._sock.recvmsg_into([target], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        if not ancillary and not flags & _TRUNCATED:
            return count
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % _DESCRIPTOR_BYTES])
        if descriptors:
            if self._descriptor is not None or len(descriptors) > 1:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise Refused(f"{self.peer} passed more than one descriptor with a frame")
            self._descriptor = descriptors[0]
        if flags & _TRUNCATED:
            raise Refused(f"a descriptor that {self.peer} passed was lost: too many open files, see `ulimit -n`")
        return count

    def _take_place(self, header: Header, place: Place) -> None:
        if isinstance(place, Park):
            self.parked = True
            return
        if isinstance(place, Discard):
            self._payload, self._unwanted_bytes = _NOTHING, header.length
            return
        if len(place) != header.length:
            raise Refused(f"{self.peer} sent {header.kind.name} of {header.length} bytes, expected {len(place)}")
        self._payload = place
        self._filled = 0


def _nothing_pending() -> int:
    return 0


def _keep_alive(sock: socket.socket) -> None:
    """Notice a peer that the network has cut off within about 5 s, without sending a frame.

    Sooner than TCP would find out that the network is back: it tries again after twice the time each time, so a cut of
    7 s would last for 13. The process that loses a connection makes a new one.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5_000)
