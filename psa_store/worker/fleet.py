"""A worker's connections to the servers of the plan: three verbs (push, pull, finish) and one wait (pump).

Not thread-safe: the thread that runs the model calls everything. Payloads go straight from and to the memory that
the caller names; what a push sends must not change until :attr:`Fleet.sending` is false.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass

from psa_store import telemetry
from psa_store.errors import Disconnected, Refused
from psa_store.plan import Plan, Server
from psa_store.wire import PROTOCOL, Connection, Header, Kind, Mailbox, Park, Reason, decode_text, encode_text
from psa_store.wire import connect as wire_connect

_CONNECT_TIMEOUT_S = 2.0
_CONNECT_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Greeting:
    """Who we are, told to every server."""

    job: str
    layout: str
    member: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A frame from a server: PARAMS whose payload is in place, DURABLE, or REFUSED with its text."""

    header: Header
    text: str = ""


class Fleet:
    """``place(header)`` names the memory for PARAMS; ``mailbox`` wakes :meth:`pump` from other threads."""

    def __init__(self, place: Callable[[Header], memoryview], mailbox: Mailbox[None]) -> None:
        self._place = place
        self._mailbox = mailbox
        self._selector = selectors.DefaultSelector()
        self._selector.register(mailbox.fileno(), selectors.EVENT_READ, None)
        self._connections: dict[str, Connection] = {}
        self._masks: dict[str, int] = {}
        self._log = telemetry.get_logger()

    def close(self) -> None:
        self.disconnect()
        self._selector.close()

    def disconnect(self) -> None:
        """Drop all connections, with whatever was in flight."""
        for server in list(self._connections):
            self._drop(server)

    def connect(self, plan: Plan, greeting: Greeting) -> bool:
        """Connect to every server of the plan that is not connected yet. False: one cannot be reached now."""
        hello = encode_text(
            {
                "protocol": PROTOCOL,
                "job": greeting.job,
                "layout": greeting.layout,
                "member": greeting.member,
            }
        )
        for server in plan.servers:
            if server.id in self._connections:
                continue
            try:
                self._connections[server.id] = self._open(server)
            except Disconnected as error:
                self._log.debug("server not reachable yet", server=server.id, why=str(error))
                time.sleep(_CONNECT_AGAIN_S)  # bounded pause; the plan is looked at again after it
                return False
            self._watch(server.id)
            self._send(server.id, Header(Kind.HELLO, length=len(hello)), hello)
        return True

    def push(self, plan: Plan, step: int, rank: int, shard: int, payload: memoryview) -> None:
        """Queue one shard's gradient; sends what the socket takes at once. A dead peer shows in :meth:`pump`."""
        header = Header(Kind.PUSH, plan.epoch, plan.revision, step, rank, shard, len(payload))
        self._send(plan.owner_of(shard).id, header, payload)

    def pull(self, plan: Plan, shard: int, at_least: int) -> None:
        """Ask for a shard as soon as its version is ``at_least``."""
        self._send(plan.owner_of(shard).id, Header(Kind.PULL, plan.epoch, plan.revision, at_least, shard=shard))

    def finish(self, plan: Plan, step: int) -> None:
        """Ask every server to make ``step`` durable; each answers DURABLE."""
        for server in plan.servers:
            self._send(server.id, Header(Kind.FINISH, plan.epoch, plan.revision, step))

    @property
    def sending(self) -> bool:
        return any(connection.sending for connection in self._connections.values())

    def pump(self, timeout_s: float) -> list[Answer]:
        """Send and receive until something arrives, a wake-up comes, or the time is over.

        Raises:
            Disconnected: a server is gone, or broke the protocol; all connections are dropped, and whatever was in
                flight is unknown.
        """
        answers: list[Answer] = []
        for key, mask in self._selector.select(timeout_s):
            if key.data is None:
                self._mailbox.drain()
                continue
            connection = self._connections.get(key.data)
            if connection is None:
                continue
            try:
                if mask & selectors.EVENT_WRITE:
                    connection.flush()
                if mask & selectors.EVENT_READ:
                    for header, payload in connection.receive():
                        answers += self._answer(header, payload)
                self._watch(key.data)
            except (Disconnected, Refused) as error:
                self.disconnect()
                raise Disconnected(str(error)) from error
        return answers

    def _answer(self, header: Header, payload: memoryview) -> list[Answer]:
        if header.kind is Kind.WELCOME:
            return []
        if header.kind is Kind.REFUSED:
            return [Answer(header, str(decode_text(payload).get("why", "")))]
        return [Answer(header)]

    def _open(self, server: Server) -> Connection:
        sock = wire_connect(server.address, server.local, server.host, _CONNECT_TIMEOUT_S)
        return Connection(sock, server.id, self._admit)

    def _admit(self, _connection: Connection, header: Header) -> memoryview | Park:
        if header.kind is Kind.PARAMS:
            return self._place(header)
        if header.kind in (Kind.WELCOME, Kind.REFUSED, Kind.DURABLE):
            return memoryview(bytearray(header.length))
        raise Refused(f"a worker takes no {header.kind.name}")

    def _send(self, server: str, header: Header, payload: memoryview | bytes = b"") -> None:
        connection = self._connections.get(server)
        if connection is None:
            return  # lost since the last pump, which will have told the caller
        connection.send(header, payload)
        try:
            connection.flush()
        except Disconnected:
            # Not told here, in the middle of backward: the next pump finds the closed socket and tells.
            self._log.debug("lost a server while sending", server=server)
        self._watch(server)

    def _watch(self, server: str) -> None:
        connection = self._connections[server]
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.sending else 0)
        before = self._masks.get(server, 0)
        if not before:
            self._selector.register(connection, mask, server)
        elif mask != before:
            self._selector.modify(connection, mask, server)
        self._masks[server] = mask

    def _drop(self, server: str) -> None:
        connection = self._connections.pop(server)
        if self._masks.pop(server, 0):
            self._selector.unregister(connection)
        connection.close()


def is_about_plan(reason: Reason) -> bool:
    """Whether a refusal means that our plan is old (or the server's): read it again."""
    return reason in (Reason.STALE, Reason.NOT_HOLDER, Reason.NOT_OWNER)
