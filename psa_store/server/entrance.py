"""Connections that have proved nothing yet: accepted here, and handed on when they have.

Used by the event loop's thread only.

All of them together can have little: so many descriptors, each so many seconds and one small buffer. What this server
needs itself is left alone, however many connect. Where there are too many, the oldest goes: a peer that has the key
needs a millisecond, so it is not the one that waits.
"""

from __future__ import annotations

import errno
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from psa_store.server.refusals import Refusals
from psa_store.wire import Accepting, Door, FirstFrame, Rejected, TlsSocket, is_own

_UNPROVED_S = 5.0
"""How long a connection may take to prove the key."""
_SWEEP_S = 0.25
_DRAIN_BYTES = 4096
_ACCEPTS_MAX = 32
"""Connections that are accepted in one turn: the others of the event loop wait meanwhile."""
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Limits:
    """For connections, made of the limit of descriptors.

    ``unproved_max``: those that have proved nothing. ``descriptor_max``: the first number that a connection may not
    have; the kernel gives the lowest that is free, so all below it are in use then.
    """

    unproved_max: int
    descriptor_max: int

    @classmethod
    def of(cls, descriptors: int) -> Limits:
        """Keep a quarter for Redis, ZooKeeper, memory of shards, files and HTTP, and an eighth for the unproved."""
        return cls(min(1024, max(8, descriptors // 8)), descriptors - min(256, descriptors // 4))


@dataclass(eq=False, slots=True)
class Candidate:
    """A connection that has proved nothing yet. ``until_s`` is a monotonic time."""

    sock: socket.socket
    peer: str
    proof: Accepting | FirstFrame
    until_s: float
    tls: TlsSocket | None = None
    """The socket, while its handshake is not done."""
    watched: bool = False
    """Whether the selector has it."""


class Entrance:
    """Owns the listeners and the connections that are unproved, in the selector of the others.

    Args:
        proved: takes over a socket whose peer has proved the key, and how.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        selector: selectors.BaseSelector,
        door: Door,
        limits: Limits,
        refusals: Refusals,
        proved: Callable[[socket.socket, str, Accepting | FirstFrame], None],
    ) -> None:
        self._listeners = listeners
        self._selector = selector
        self._door = door
        self._limits = limits
        self._refusals = refusals
        self._proved = proved
        self._candidates: dict[Candidate, None] = {}
        """The oldest first."""
        self._listens = False
        self._sweep_at_s = 0.0
        self._listen(True)

    def __len__(self) -> int:
        return len(self._candidates)

    def accept(self, listener: socket.socket) -> None:
        """Take in connections that wait, so many of them that others have their turn."""
        for _ in range(_ACCEPTS_MAX):
            try:
                sock, address = listener.accept()
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS:
                    self._listen(False)  # until the next sweep: the event loop must not turn for nothing
                    self._sweep_at_s = time.monotonic() + _SWEEP_S
                    self._refusals.note("a peer", f"no descriptor is left: {error.strerror}")
                return  # otherwise none waits any more, or the peer is gone again
            if sock.fileno() >= self._limits.descriptor_max:
                sock.close()
                self._refusals.note("a peer", "too many connections for the limit of descriptors, see `ulimit -n`")
            elif sock.family == socket.AF_UNIX and not is_own(sock):
                sock.close()
                self._refusals.note("a local peer", "another user of this machine")
            else:
                self._begin(sock, str(address or "local client"))

    def serve(self, candidate: Candidate) -> None:
        """Read what a candidate has sent, and answer; hand it on if that proves the key."""
        if candidate not in self._candidates:
            return  # closed by an earlier event of this turn
        try:
            is_proved = _read(candidate)
        except Rejected as error:
            with suppress(OSError):  # it is gone: so much the better
                candidate.sock.send(error.answer)
            self._end(candidate, str(error))
        except ssl.SSLError as error:
            self._end(candidate, f"no TLS: {error.reason or error}; see PSA_TLS_CERT, PSA_TLS_KEY and PSA_TLS_CA")
        except OSError:
            self._end(candidate, "closed the connection before it had proved anything")
        else:
            if is_proved:
                self._forget(candidate)
                self._proved(candidate.sock, candidate.peer, candidate.proof)

    def sweep(self) -> None:
        """Close those whose time is over. Cheap, unless it is time to look."""
        now_s = time.monotonic()
        if now_s < self._sweep_at_s:
            return
        self._sweep_at_s = now_s + _SWEEP_S
        self._listen(True)
        while self._candidates and (oldest := next(iter(self._candidates))).until_s <= now_s:
            self._end(oldest, f"proved nothing within {_UNPROVED_S:.0f} s")
        self._refusals.tell()

    def close(self) -> None:
        for candidate in self._candidates:
            candidate.sock.close()
        self._candidates.clear()
        for listener in self._listeners:
            listener.close()

    def _begin(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        tls = None
        if sock.family != socket.AF_UNIX:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._door.tls is not None:
                    sock = tls = self._door.tls.accepting(sock)
            except OSError:
                sock.close()  # it is gone again
                return
        while len(self._candidates) >= self._limits.unproved_max:
            self._end(next(iter(self._candidates)), "made room for newer ones: too many prove nothing")
        candidate = Candidate(sock, peer, self._door.accepting(), time.monotonic() + _UNPROVED_S, tls)
        self._candidates[candidate] = None
        self.serve(candidate)  # what it says first has often come with it
        if candidate in self._candidates:
            self._selector.register(sock, selectors.EVENT_READ, candidate)
            candidate.watched = True

    def _end(self, candidate: Candidate, why: str) -> None:
        self._forget(candidate)
        with suppress(OSError):  # what is unread at the end has TCP drop our last word, which says what is wrong
            socket.socket.recv(candidate.sock, _DRAIN_BYTES)
        candidate.sock.close()
        self._refusals.note(candidate.peer, why)

    def _forget(self, candidate: Candidate) -> None:
        del self._candidates[candidate]
        if candidate.watched:
            self._selector.unregister(candidate.sock)

    def _listen(self, listens: bool) -> None:
        if listens is self._listens:
            return
        self._listens = listens
        for listener in self._listeners:
            if listens:
                self._selector.register(listener, selectors.EVENT_READ, listener)
            else:
                self._selector.unregister(listener)


def _read(candidate: Candidate) -> bool:
    """Read and answer as far as possible now; True: it has proved the key. Raises Rejected, or OSError: it is lost."""
    proof = candidate.proof
    if candidate.tls is not None:
        try:
            candidate.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        candidate.tls = None
    while proof.wanted:
        try:
            data = candidate.sock.recv(proof.wanted)
        except (BlockingIOError, InterruptedError):
            return False
        if not data:
            raise ConnectionResetError
        answer = proof.take(data)
        if answer and candidate.sock.send(answer) < len(answer):
            raise ConnectionResetError  # it is smaller than the buffer of any socket
    return True
