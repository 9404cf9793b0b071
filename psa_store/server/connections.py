"""All connections of a server: accepts, reads, sends and closes them, for an event loop that judges their frames."""

from __future__ import annotations

import select
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

from psa_store import logs
from psa_store.errors import Disconnected, Refused
from psa_store.server.entrance import Candidate, Entrance, Limits
from psa_store.server.refusals import Refusals
from psa_store.wire import Accepting, Connection, Door, FirstFrame, Header, Passable, Place, Role, Traffic

_NAMELESS_S = 10.0
"""How long a connection may last on which no member of the job has said HELLO: it asked something, and may go."""


class Host(Protocol):
    """What the event loop does with connections."""

    def admit(self, connection: Connection, header: Header) -> Place:
        """Where a payload goes, as :mod:`psa_store.wire.connection` asks."""

    def on_frame(self, connection: Connection, header: Header, payload: memoryview) -> None:
        """A frame is complete; may raise Refused if the peer is broken."""

    def on_stranger(self, connection: Connection, why: str) -> None:
        """The peer broke the protocol: say a last word, it will be closed."""

    def on_gone(self, connection: Connection) -> None:
        """The connection is about to be closed."""


class HasFileno(Protocol):
    """What ends :meth:`Connections.wait` besides connections: the event loop's mailbox."""

    def fileno(self) -> int: ...


class Connections:
    """Owns the listeners, the selector and every connection. One thread, the event loop's, calls everything.

    Args:
        door: what a peer has to prove before a frame is read.
        refused: called for each connection that is refused.
    """

    def __init__(
        self,
        host: Host,
        listeners: Sequence[socket.socket],
        wake: HasFileno,
        door: Door,
        limits: Limits,
        refused: Callable[[], None],
    ) -> None:
        self.traffic = Traffic()
        self._host = host
        self._selector = selectors.DefaultSelector()
        self._refusals = Refusals(refused)
        self._entrance = Entrance(listeners, self._selector, door, limits, self._refusals, self._on_proved)
        self._nameless: dict[Connection, float] = {}
        """Until when those may last whose peers have said no HELLO; the oldest first."""
        self._connections: set[Connection] = set()
        self._watched: dict[Connection, int] = {}
        self._parked: set[Connection] = set()
        self._log = logs.get_logger()
        self._selector.register(wake.fileno(), selectors.EVENT_READ, None)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._connections))

    def wait(self, timeout_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait until a connection can go on, a process connects, or a message comes."""
        return self._selector.select(timeout_s)

    def serve(self, events: Sequence[tuple[selectors.SelectorKey, int]]) -> None:
        """Deal with what :meth:`wait` found."""
        for key, mask in events:
            if isinstance(key.data, Connection):
                self._serve(key.data, mask)
            elif isinstance(key.data, Candidate):
                self._entrance.serve(key.data)
            elif isinstance(key.data, socket.socket):
                self._entrance.accept(key.data)
        self._entrance.sweep()
        if self._nameless:
            self._close_nameless()
        if self._parked:
            self._close_dead_parked()

    def send(
        self,
        connection: Connection,
        header: Header,
        payload: memoryview | bytes = b"",
        memory: Passable | None = None,
    ) -> None:
        """Send what the socket takes now, and the rest when it takes more. A dead peer is closed."""
        try:
            connection.send_now(header, payload, memory)
            self._watch(connection)
        except Disconnected:
            self.close(connection)

    def add(self, sock: socket.socket, peer: str, role: Role | None = None) -> Connection:
        """Take over a connected socket. ``role``: what the peer has proved to be."""
        connection = Connection(sock, peer, self._host.admit, self.traffic)
        connection.role = role
        self._connections.add(connection)
        self._watch(connection)
        return connection

    def close(self, connection: Connection) -> None:
        """Close a connection. Idempotent."""
        if connection in self._connections:
            self._connections.discard(connection)
            self._parked.discard(connection)
            self._nameless.pop(connection, None)
            self._host.on_gone(connection)
            if self._watched.pop(connection, 0):
                self._selector.unregister(connection)
            connection.close()

    def close_all(self) -> None:
        for connection in self:
            self.close(connection)
        self._entrance.close()
        self._selector.close()

    def detach_all(self) -> None:
        """Copy what is still unsent: the memory it comes from is about to change."""
        for connection in self._connections:
            if connection.sending:
                connection.detach()

    def wake_parked(self) -> None:
        """A new plan: ask again about the frames that had to wait for one."""
        for connection in self:
            if connection.parked and connection in self._connections:
                try:
                    connection.resume()
                except Refused as error:
                    self._throw_out(connection, error)
                else:
                    self._serve(connection, selectors.EVENT_READ)

    def _on_proved(self, sock: socket.socket, peer: str, proof: Accepting | FirstFrame) -> None:
        """A peer has proved the key; or there is none, and its first frame is here."""
        connection = self.add(sock, peer, proof.role)
        self._nameless[connection] = time.monotonic() + _NAMELESS_S
        frames: list[tuple[Header, memoryview]] = []
        if isinstance(proof, FirstFrame):
            assert proof.header is not None
            frames.append((proof.header, memoryview(proof.payload)))
        self._take(connection, chain(frames, connection.receive()))  # TLS may have taken more from the socket

    def _close_nameless(self) -> None:
        connection, until_s = next(iter(self._nameless.items()))
        if connection.member:
            del self._nameless[connection]
        elif until_s <= time.monotonic():
            self._refusals.note(connection.peer, f"said no HELLO within {_NAMELESS_S:.0f} s")
            self.close(connection)

    def _serve(self, connection: Connection, mask: int) -> None:
        if connection not in self._connections:
            return  # closed by an earlier event of this turn
        self._take(connection, connection.receive() if mask & selectors.EVENT_READ else ())

    def _take(self, connection: Connection, frames: Iterable[tuple[Header, memoryview]]) -> None:
        """Have these frames handled, and send what waits."""
        try:
            for header, payload in frames:
                self._host.on_frame(connection, header, payload)
            if connection.sending:
                connection.flush()
            self._watch(connection)
        except Disconnected as error:
            self._log.debug("connection ended", member=connection.member, why=str(error))
            self.close(connection)
        except Refused as error:
            self._throw_out(connection, error)

    def _throw_out(self, connection: Connection, error: Refused) -> None:
        self._refusals.note(connection.peer, str(error), connection.member)
        self._host.on_stranger(connection, str(error))
        self.close(connection)

    def _watch(self, connection: Connection) -> None:
        """Wait for what the connection can do next.

        Nothing is read while it is parked, until a plan wakes it, nor while its peer does not read what it asked for.
        """
        mask = 0 if connection.parked or connection.congested else selectors.EVENT_READ
        if connection.sending:
            mask |= selectors.EVENT_WRITE
        before = self._watched.get(connection, 0)
        if connection not in self._connections:
            return
        if connection.parked:
            self._parked.add(connection)
        elif self._parked:
            self._parked.discard(connection)
        if mask == before:
            return
        if not before:
            self._selector.register(connection, mask, connection)
        elif not mask:
            self._selector.unregister(connection)
        else:
            self._selector.modify(connection, mask, connection)
        self._watched[connection] = mask

    def _close_dead_parked(self) -> None:
        """Nothing is read from a connection that is parked, so its end is looked for."""
        poller = select.poll()
        by_fileno = {connection.fileno(): connection for connection in self._parked}
        for fileno in by_fileno:
            poller.register(fileno, getattr(select, "POLLRDHUP", 0))
        for fileno, _ in poller.poll(0):
            self.close(by_fileno[fileno])
