"""A TCP proxy that cuts connections at a chosen byte, delays, throttles, stalls or refuses them.

One thread per direction of each connection. A direction reads a piece, does to it what is set at that moment, and
passes it on; so a fault that is set takes effect with the next piece.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

_PIECE_BYTES = 1 << 16
_CONNECT_S = 2.0
_SILENT_POLL_S = 0.05


class Direction(StrEnum):
    """Seen from the client."""

    REQUESTS = "requests"
    REPLIES = "replies"


@dataclass(frozen=True, slots=True)
class _Conditions:
    """What every connection is subject to. Replaced as a whole, so that no thread sees half of a change."""

    delay_s: float = 0.0
    bytes_per_s: int = 0
    silent: bool = False
    refusing: bool = False


class Proxy:
    """Passes bytes between its own port and a target. Thread-safe.

    ``fired`` counts the cuts that happened; a cut happens once. ``affected`` counts what a state has changed: pieces
    that came later or not at all, connections that were refused. ``passed_bytes`` counts both directions. Where the
    target is down, the client's connection is closed, as the target's host would do.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.fired = 0
        self.passed_bytes = 0
        self.affected = 0
        self._target = target
        self._lock = threading.Lock()
        self._due: Callable[[Direction, bytes], int | None] | None = None
        self._forever = False
        self._conditions = _Conditions()
        self._closing = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="proxy")
        self._accepting.start()

    def retarget(self, target: tuple[str, int]) -> None:
        """New connections go there from now on, as after a failover behind a name; those that are open stay."""
        self._target = target

    # --- cuts, each of which happens once

    def cut_requests_after(self, count: int) -> None:
        """Pass so many more bytes to the target, then cut."""
        self._arm(_after(Direction.REQUESTS, count), False)

    def cut_replies_after(self, count: int) -> None:
        """Pass so many more bytes to the client, then cut: later replies are lost, their commands are not."""
        self._arm(_after(Direction.REPLIES, count), False)

    def cut_before(self, word: bytes, *, forever: bool) -> None:
        """Cut before the Redis command with this word gets to the target; what was sent before it does.

        ``forever`` refuses all later connections as well.
        """

        def due(direction: Direction, data: bytes) -> int | None:
            wanted = direction is Direction.REQUESTS and word in data
            return data.rfind(b"*", 0, data.find(word)) if wanted else None

        self._arm(due, forever)

    # --- states, until pass_all

    def delay(self, seconds: float) -> None:
        """What passes arrives later, in order."""
        self._conditions = _Conditions(delay_s=seconds)

    def throttle(self, bytes_per_s: int) -> None:
        """Each direction of each connection carries no more than this."""
        self._conditions = _Conditions(bytes_per_s=bytes_per_s)

    def stall(self) -> None:
        """Nothing passes, and no connection ends."""
        self._conditions = _Conditions(silent=True)

    def refuse(self) -> None:
        """Close all connections, and new ones at once."""
        self._conditions = _Conditions(refusing=True)
        self._hang_up()

    def pass_all(self) -> None:
        """Undo everything that was set and has not happened."""
        with self._lock:
            self._due = None
            self._conditions = _Conditions()

    def close(self) -> None:
        """End all connections and threads. Idempotent."""
        self._closing.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
        self._accepting.join()
        self._hang_up()
        for thread in list(self._threads):
            thread.join()
        self._listener.close()

    # --- threads

    def _arm(self, due: Callable[[Direction, bytes], int | None], forever: bool) -> None:
        with self._lock:
            self._due, self._forever = due, forever

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="proxy")
            with self._lock:
                self._threads = {each for each in self._threads if each.is_alive()} | {thread}
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        """Serve one connection from its beginning to its end; the replies have a thread of their own."""
        with client:
            if self._conditions.refusing:
                self._note()
                return
            if not self._wait_while_silent():
                return
            try:
                server = socket.create_connection(self._target, timeout=_CONNECT_S)
            except OSError:
                return
            with server:
                server.settimeout(None)
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._open |= {client, server}
                replies = threading.Thread(
                    target=self._pass, args=(Direction.REPLIES, server, client), name="proxy-replies"
                )
                replies.start()
                self._pass(Direction.REQUESTS, client, server)
                replies.join()
                with self._lock:
                    self._open -= {client, server}

    def _pass(self, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        try:
            if self._closing.is_set() or self._conditions.refusing:
                return  # set between the accepting and now
            while data := source.recv(_PIECE_BYTES):
                if not self._wait_while_silent():
                    break
                conditions = self._conditions
                if conditions.delay_s or conditions.bytes_per_s:
                    self._note()
                if conditions.delay_s:
                    self._closing.wait(conditions.delay_s)
                if conditions.bytes_per_s:
                    self._closing.wait(len(data) / conditions.bytes_per_s)
                at = self._cut_at(direction, data)
                sink.sendall(data if at is None else data[:at])
                if at is not None:
                    break
        except OSError:
            pass
        finally:
            for end in (source, sink):
                _shut(end)

    def _cut_at(self, direction: Direction, data: bytes) -> int | None:
        with self._lock:
            at = self._due(direction, data) if self._due else None
            if at is not None:
                self._due = None
                self.fired += 1
                if self._forever:
                    self._conditions = _Conditions(refusing=True)
            self.passed_bytes += len(data) if at is None else at
            return at

    def _wait_while_silent(self) -> bool:
        """Return False when the proxy is being closed, or refuses connections by now."""
        if self._conditions.silent:
            self._note()
        while self._conditions.silent and not self._closing.is_set():
            time.sleep(_SILENT_POLL_S)  # bounded by the fault that silenced it
        return not self._closing.is_set() and not self._conditions.refusing

    def _hang_up(self) -> None:
        with self._lock:
            self.affected += len(self._open)
            for end in self._open:
                _shut(end)

    def _note(self) -> None:
        with self._lock:
            self.affected += 1


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _after(wanted: Direction, count: int) -> Callable[[Direction, bytes], int | None]:
    left = count

    def due(direction: Direction, data: bytes) -> int | None:
        nonlocal left
        if direction is not wanted:
            return None
        left -= len(data)
        return left + len(data) if left < 0 else None

    return due
