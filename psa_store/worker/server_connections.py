"""A worker's connections to the servers of the plan: four verbs (push, pull, wait_for, finish) and one wait (pump).

The carrier is chosen here, per server, and nobody above asks which it is: memory that both map if the server is on
this host, TCP if not. Not thread-safe: the thread that runs the model calls everything.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from psa_store import logs
from psa_store.cluster import Cut, Plan, Server
from psa_store.errors import Disconnected, Refused
from psa_store.job.layout import Layout
from psa_store.wire import (
    PROTOCOL,
    Connection,
    Flag,
    Header,
    Kind,
    Mailbox,
    Park,
    Reason,
    SharedMemory,
    Traffic,
    can_show,
    decode_text,
    encode_text,
)
from psa_store.wire import connect as wire_connect
from psa_store.worker.gradients import GradientMemory

_CONNECT_TIMEOUT_S = 2.0
_CONNECT_AGAIN_S = 0.05
_NUMBER_BYTES = 8
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Hello:
    """Who we are, told to every server."""

    job: str
    layout: str
    member: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A frame from a server: PARAMS whose payload is in place, STATE, VERSION, DURABLE, CLOCKS, or REFUSED."""

    header: Header
    server: str
    text: str = ""
    clocks: Sequence[int] = ()
    """With CLOCKS: by rank, how many pushes count; then by rank, how many are in the version ``header.step``."""
    payload: memoryview = _NOTHING
    """With STATE and PARAMS."""
    descriptor: int | None = None
    """With VERSION: memory in which the server publishes parameters from now on. The receiver owns it."""


class ServerConnections:
    """``place(header)`` names the memory for PARAMS; ``mailbox`` wakes :meth:`pump` from other threads."""

    def __init__(self, layout: Layout, place: Callable[[Header], memoryview], mailbox: Mailbox[None]) -> None:
        self.traffic = Traffic()
        self._layout = layout
        self._place = place
        self._mailbox = mailbox
        self._share = False
        self._shared: dict[str, dict[GradientMemory, int]] = {}
        """Memory that each server of this host has the descriptor of, and its number there."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(mailbox.fileno(), selectors.EVENT_READ, None)
        self._connections: dict[str, Connection] = {}
        self._masks: dict[str, int] = {}
        self._log = logs.get_logger()

    def close(self) -> None:
        self.disconnect()
        self._selector.close()

    def share_memory(self) -> None:
        """From the next connection on, share memory with servers of this host, where that is possible."""
        self._share = can_show()

    def disconnect(self) -> None:
        """Drop all connections, with whatever was in flight."""
        for server in list(self._connections):
            self._drop(server)

    def connect(self, plan: Plan, hello: Hello) -> bool:
        """Connect to every server of the plan that is not connected yet. False: one cannot be reached now."""
        payload = encode_text(
            {
                "protocol": PROTOCOL,
                "job": hello.job,
                "layout": hello.layout,
                "member": hello.member,
                "by_reference": self._share,
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
            self._send(server.id, Header(Kind.HELLO, length=len(payload)), payload)
        return True

    def push(
        self, plan: Plan, step: int, rank: int, shards: Sequence[int], gradients: GradientMemory, finite: bool
    ) -> None:
        """Push the gradients of some shards. A dead peer shows in :meth:`pump`.

        By value, ``gradients`` must not change until :attr:`sending` is false; by reference, not before the next
        version is here.
        """
        flags = Flag.NONE if finite else Flag.NONFINITE
        for owner, first, count in _runs(plan, shards):
            server = plan.servers[owner].id
            if server in self._shared:
                number = self._number_of(server, gradients)
                here = flags | Flag.BY_REFERENCE
                header = Header(
                    Kind.PUSH, plan.term, plan.revision, step, rank, first, flags=here, memory=number, count=count
                )
                self._queue(server, header)
            else:
                for shard in range(first, first + count):
                    self.push_value(plan, step, rank, shard, gradients.bytes_of(self._layout.shards[shard]), flags)
            self._flush(server)

    def push_value(
        self, plan: Plan, step: int, rank: int, shard: int, payload: memoryview, flags: Flag = Flag.NONE
    ) -> None:
        """Push one shard by value, whatever the carrier; ``payload`` must not change until it is sent."""
        header = Header(Kind.PUSH, plan.term, plan.revision, step, rank, shard, len(payload), flags=flags)
        self._send(plan.owner_of(shard).id, header, payload)

    def _number_of(self, server: str, gradients: GradientMemory) -> int:
        """The number under which a server of this host knows this memory; passes it on the first time."""
        numbers = self._shared[server]
        if gradients not in numbers:
            numbers[gradients] = len(numbers)
            gradients.passed = True
            self._queue(server, Header(Kind.SHARE, memory=numbers[gradients]), memory=gradients.shared)
        return numbers[gradients]

    def pull(self, plan: Plan, shard: int, at_least: int) -> None:
        """Ask for a shard as soon as its version is ``at_least``."""
        self._send(plan.owner_of(shard).id, Header(Kind.PULL, plan.term, plan.revision, at_least, shard=shard))

    def pull_state(self, plan: Plan, shard: int, version: int, rank: int) -> None:
        """Ask for what a rank carries in a shard at a version; answered by STATE."""
        header = Header(Kind.PULL, plan.term, plan.revision, version, rank, shard, flags=Flag.STATE)
        self._send(plan.owner_of(shard).id, header)

    def wait_for(self, plan: Plan, servers: Iterable[str], version: int, rank: int = 0) -> None:
        """Have done with all versions below; each server brings this one when it is there, and says VERSION.

        On arrival: each brings what it has when ``rank`` may start its step ``version``.
        """
        for server in servers:
            self._send(server, Header(Kind.AWAIT, plan.term, plan.revision, version, rank))

    def finish(self, plan: Plan, servers: Iterable[str], version: int) -> None:
        """Ask servers to make a version durable; each answers DURABLE."""
        for server in servers:
            self._send(server, Header(Kind.FINISH, plan.term, plan.revision, version))

    def ask_clocks(self, plan: Plan, servers: Iterable[str]) -> None:
        """Ask how many pushes of each rank count; each answers CLOCKS, as it does after every commit."""
        for server in servers:
            self._send(server, Header(Kind.CLOCKS, plan.term, plan.revision))

    def cut(self, plan: Plan, servers: Iterable[str], at: Cut, rank: int, clock: int) -> None:
        """Tell with how many pushes of a rank a checkpoint ends."""
        for server in servers:
            self._send(server, Header(Kind.CUT, plan.term, plan.revision, clock, rank, barrier=int(at.barrier)))

    @property
    def shares(self) -> bool:
        """Whether some server reads gradients where they lie."""
        return bool(self._shared)

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
                        answers += self._answer(key.data, connection, header, payload)
                self._watch(key.data)
            except (Disconnected, Refused) as error:
                for answer in answers:
                    if answer.descriptor is not None:
                        os.close(answer.descriptor)
                self.disconnect()
                raise Disconnected(str(error)) from error
        return answers

    def _answer(self, server: str, connection: Connection, header: Header, payload: memoryview) -> list[Answer]:
        if header.kind is Kind.WELCOME:
            return []
        if header.kind is Kind.REFUSED:
            return [Answer(header, server, str(decode_text(payload).get("why", "")))]
        if header.kind is Kind.STATE:
            return [Answer(header, server, payload=payload)]
        if header.kind is Kind.CLOCKS:
            if header.length % _NUMBER_BYTES:
                raise Refused(f"CLOCKS of {header.length} bytes: not numbers")
            return [Answer(header, server, clocks=tuple(np.frombuffer(payload, dtype="<i8").tolist()))]
        return [Answer(header, server, payload=payload, descriptor=connection.take_descriptor())]

    def _open(self, server: Server) -> Connection:
        local = server.local if self._share else ""
        sock = wire_connect(server.address, local, server.host, _CONNECT_TIMEOUT_S)
        connection = Connection(sock, server.id, self._admit, self.traffic)
        if connection.is_local:
            self._shared[server.id] = {}
        return connection

    def _admit(self, _connection: Connection, header: Header) -> memoryview | Park:
        if header.kind is Kind.PARAMS:
            return self._place(header)
        if header.kind in (Kind.WELCOME, Kind.REFUSED, Kind.VERSION, Kind.DURABLE, Kind.CLOCKS, Kind.STATE):
            return memoryview(bytearray(header.length))
        raise Refused(f"a worker takes no {header.kind.name}")

    def _send(self, server: str, header: Header, payload: memoryview | bytes = b"") -> None:
        self._queue(server, header, payload)
        self._flush(server)

    def _queue(
        self,
        server: str,
        header: Header,
        payload: memoryview | bytes = b"",
        memory: SharedMemory | None = None,
    ) -> None:
        connection = self._connections.get(server)
        if connection is not None:  # lost since the last pump, which will have told the caller
            connection.send(header, payload, memory)

    def _flush(self, server: str) -> None:
        connection = self._connections.get(server)
        if connection is None:
            return
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
        self._shared.pop(server, None)
        if self._masks.pop(server, 0):
            self._selector.unregister(connection)
        connection.close()


def _runs(plan: Plan, shards: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbouring shards of one owner: (owner, first shard, how many)."""
    run: tuple[int, int, int] | None = None
    for shard in shards:
        owner = plan.owners[shard]
        if run is not None and run[0] == owner and run[1] + run[2] == shard:
            run = owner, run[1], run[2] + 1
        else:
            if run is not None:
                yield run
            run = owner, shard, 1
    if run is not None:
        yield run


def is_about_plan(reason: Reason) -> bool:
    """Whether a refusal means that our plan is old (or the server's): read it again."""
    return reason in (Reason.STALE, Reason.NOT_HOLDER, Reason.NOT_OWNER)
