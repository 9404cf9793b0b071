"""A worker's connections to the servers of the plan: four verbs (push, pull, wait_for, finish) and one wait (pump).

The carrier is chosen here, per server, and nothing above asks which it is: memory that both map if the server is on
this host, TCP if not. Not thread-safe: the thread that runs the model calls everything.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from psa_store import logs
from psa_store.cluster import Cell, Cut, Plan, Server
from psa_store.errors import Disconnected, Refused, Unproved
from psa_store.job.layout import Layout
from psa_store.logs import Waits
from psa_store.optim.note import PLAIN, GradientNote, to_marks
from psa_store.wire import (
    Connection,
    Door,
    Flag,
    Header,
    Hello,
    Kind,
    Mailbox,
    Park,
    Reason,
    Refusal,
    Role,
    SharedMemory,
    Traffic,
    can_show,
    decode,
    encode,
)
from psa_store.wire import connect as wire_connect
from psa_store.worker.carry import CarryPool, Parcel, by_value
from psa_store.worker.gradients import GradientMemory
from psa_store.worker.unproved import KeyWatch

_CONNECT_TIMEOUT_S = 2.0
_CONNECT_AGAIN_S = 0.05
_PROVE_AGAIN_S = 0.5
_NUMBER_BYTES = 8
_ANSWERS = frozenset(
    {Kind.WELCOME, Kind.REFUSED, Kind.VERSION, Kind.DURABLE, Kind.CLOCKS, Kind.STATE, Kind.RELAY, Kind.WANT}
)
_NOTHING = memoryview(b"")
_FINITE = Flag.BY_REFERENCE
_NOT_FINITE = Flag.BY_REFERENCE | Flag.NONFINITE


@dataclass(frozen=True, slots=True)
class Answer:
    """A frame from a server: PARAMS whose payload is in place, or what :data:`_ANSWERS` has besides."""

    header: Header
    server: str
    text: str = ""
    clocks: Sequence[int] = ()
    """With CLOCKS: by rank, how many pushes count; then by rank, how many are in the version ``header.step``."""
    payload: memoryview = _NOTHING
    """With STATE, PARAMS and RELAY."""
    descriptor: int | None = None
    """With VERSION: memory in which the server publishes parameters from now on; with RELAY, that of its tensors. The
    receiver owns it."""


class ServerConnections:
    """``mailbox`` wakes :meth:`pump` from other threads. Set ``place`` before the first :meth:`connect`."""

    place: Callable[[Header], memoryview]
    """Names the memory for PARAMS."""

    def __init__(self, layout: Layout, mailbox: Mailbox[None], door: Door, waits: Waits) -> None:
        self.traffic = Traffic()
        self.carries = CarryPool()
        self._layout = layout
        self._mailbox = mailbox
        self._door = door
        self._share = False
        self._key_watch = KeyWatch(waits)
        self._waits = waits
        self._plan: Plan
        self._owners: list[str] = []
        """By shard, the server that owns it."""
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

    def follow(self, plan: Plan) -> None:
        """What is sent from now on goes by this plan."""
        self._plan = plan
        self._owners = [plan.servers[index].id for index in plan.owners]

    def disconnect(self) -> None:
        """Drop all connections, with whatever was in flight."""
        for server in list(self._connections):
            self._drop(server)

    def connect(self, job: str, member: str) -> bool:
        """Connect to every server of the plan that is not connected yet. False: one cannot be reached now."""
        hello = encode(Hello(job, self._layout.fingerprint, member, by_reference=self._share))
        for server in self._plan.servers:
            if server.id in self._connections:
                continue
            try:
                self._connections[server.id] = self._open(server)
            except Unproved as error:
                self._key_watch.failed(server.id, error)
                time.sleep(_PROVE_AGAIN_S)
                return False
            except Disconnected as error:
                self._key_watch.unreachable()
                what = f"server {server.id} at {server.address} to be reached"
                self._waits.on("connect", what, str(error))
                time.sleep(_CONNECT_AGAIN_S)  # bounded pause; the plan is looked at again after it
                return False
            self._key_watch.proved()
            self._watch(server.id)
            self._send(server.id, Header(Kind.HELLO, length=len(hello)), hello)
        self._waits.over("connect")
        return True

    def push(
        self,
        step: int,
        rank: int,
        shards: Sequence[int],
        gradients: GradientMemory,
        note: GradientNote = PLAIN,
        *,
        finite: bool,
    ) -> None:
        """Push the gradients of some shards. A dead peer shows in :meth:`pump`.

        By value, ``gradients`` must not change until :attr:`sending` is false; by reference, not before the next
        version is here. By reference one frame says it of neighbouring shards of one owner.
        """
        term, revision, owners, count = self._plan.term, self._plan.revision, self._owners, len(shards)
        start = 0
        while start < count:
            first, server = shards[start], owners[shards[start]]
            end = start + 1
            while end < count and shards[end] == first + end - start and owners[shards[end]] == server:
                end += 1
            numbers = self._shared.get(server)
            if numbers is None:
                flags = Flag.NONE if finite else Flag.NONFINITE
                for shard in shards[start:end]:
                    self.push_value(step, rank, shard, gradients.bytes_of(shard), flags, note)
            else:
                number = numbers.get(gradients)
                if number is None:
                    number = self._pass_on(server, gradients)
                flags = _FINITE if finite else _NOT_FINITE
                header = Header(
                    Kind.PUSH, term, revision, step, rank, first, flags=flags, memory=number, shards=end - start
                )
                marks = b""
                if note is not PLAIN:
                    marks = b"".join(self._marks(note, shard) for shard in shards[start:end])
                    header = _with_note(header, note, marks)
                self._send(server, header, marks)
            start = end

    def push_value(
        self,
        step: int,
        rank: int,
        shard: int,
        payload: memoryview | bytes,
        flags: Flag = Flag.NONE,
        note: GradientNote = PLAIN,
    ) -> None:
        """Push one shard by value, whatever the carrier; ``payload`` must not change until it is sent."""
        plan = self._plan
        header = Header(Kind.PUSH, plan.term, plan.revision, step, rank, shard, len(payload), flags=flags)
        if note is not PLAIN:
            marks = self._marks(note, shard)
            payload = b"".join((payload, marks))
            header = _with_note(header, note, marks)
        self._send(self._owners[shard], header, payload)

    def _marks(self, note: GradientNote, shard: int) -> bytes:
        return to_marks(note.absent, self._layout.shards[shard]) if note.absent else b""

    def _pass_on(self, server: str, gradients: GradientMemory) -> int:
        """Give a server of this host the memory of gradients; returns its number there."""
        number = self._shared[server][gradients] = len(self._shared[server])
        gradients.passed = True
        self._send(server, Header(Kind.SHARE, memory=number), memory=gradients.shared)
        return number

    def pull(self, shard: int, at_least: int) -> None:
        """Ask for a shard as soon as its version is ``at_least``."""
        plan = self._plan
        self._send(self._owners[shard], Header(Kind.PULL, plan.term, plan.revision, at_least, shard=shard))

    def pull_state(self, shard: int, version: int, rank: int) -> None:
        """Ask for the state of a rank in a shard at a version; answered by STATE."""
        plan = self._plan
        header = Header(Kind.PULL, plan.term, plan.revision, version, rank, shard, flags=Flag.STATE)
        self._send(self._owners[shard], header)

    def wait_for(self, servers: Iterable[str], version: int, rank: int = 0, stages: Iterable[int] = (0,)) -> None:
        """Have done with all versions below; each server brings this one when it is there, and says VERSION.

        On arrival: each brings what it has when ``rank`` may start its step ``version``. ``stages``: those whose shards
        are wanted.
        """
        wanted = sum(1 << stage for stage in stages)
        header = Header(Kind.AWAIT, self._plan.term, self._plan.revision, version, rank, stages=wanted)
        for server in servers:
            self._send(server, header)

    def finish(self, servers: Iterable[str], version: int) -> None:
        """Ask servers to make a version durable; each answers DURABLE."""
        for server in servers:
            self._send(server, Header(Kind.FINISH, self._plan.term, self._plan.revision, version))

    def relay(self, server: str, step: int, cell: Cell, microbatch: int, backward: bool, parcel: Parcel) -> None:
        """Send what is for a cell; the server keeps it, and hands it on to the worker of the cell."""
        plan = self._plan
        flags = Flag.BACKWARD if backward else Flag.NONE
        memory: SharedMemory | None = None
        if server in self._shared:
            flags |= Flag.BY_REFERENCE
            memory, payload = self.carries.write(parcel), memoryview(parcel.describe())
        else:
            payload = by_value(parcel)
        header = Header(
            Kind.RELAY,
            plan.term,
            plan.revision,
            step,
            cell.rank,
            length=len(payload),
            flags=flags,
            stage=cell.stage,
            microbatch=microbatch,
        )
        self._send(server, header, payload, memory)

    def want(self, server: str, step: int, cell: Cell) -> None:
        """Have what is for a cell in a step sent here; each comes as RELAY."""
        plan = self._plan
        self._send(server, Header(Kind.WANT, plan.term, plan.revision, step, cell.rank, stage=cell.stage))

    def ask_clocks(self, servers: Iterable[str]) -> None:
        """Ask how many pushes of each rank count; each answers CLOCKS, as it does after every commit."""
        for server in servers:
            self._send(server, Header(Kind.CLOCKS, self._plan.term, self._plan.revision))

    def cut(self, servers: Iterable[str], at: Cut, rank: int, clock: int) -> None:
        """Tell with how many pushes of a rank a checkpoint ends."""
        plan = self._plan
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
                    self._watch(key.data)
                if mask & selectors.EVENT_READ:
                    for header, payload in connection.receive():
                        if header.kind is not Kind.WELCOME:
                            answers.append(self._answer(key.data, connection, header, payload))
            except (Disconnected, Refused) as error:
                for answer in answers:
                    if answer.descriptor is not None:
                        os.close(answer.descriptor)
                self.disconnect()
                raise Disconnected(str(error)) from error
        return answers

    def _answer(self, server: str, connection: Connection, header: Header, payload: memoryview) -> Answer:
        if header.kind is Kind.REFUSED:
            return Answer(header, server, decode(Refusal, payload).why)
        if header.kind is Kind.CLOCKS:
            if header.length % _NUMBER_BYTES:
                raise Refused(f"CLOCKS of {header.length} bytes: not numbers")
            return Answer(header, server, clocks=tuple(np.frombuffer(payload, dtype="<i8").tolist()))
        descriptor = connection.take_descriptor() if header.kind in (Kind.VERSION, Kind.RELAY) else None
        return Answer(header, server, payload=payload, descriptor=descriptor)

    def _open(self, server: Server) -> Connection:
        local = server.local if self._share else ""
        sock = wire_connect(server.address, local, server.host, _CONNECT_TIMEOUT_S, self._door, Role.WORKER)
        connection = Connection(sock, server.id, self._admit, self.traffic)
        if connection.is_local:
            self._shared[server.id] = {}
        return connection

    def _admit(self, _connection: Connection, header: Header) -> memoryview | Park:
        if header.kind is Kind.PARAMS:
            return self.place(header)
        if header.kind in _ANSWERS:
            return memoryview(bytearray(header.length))
        raise Refused(f"a worker takes no {header.kind.name}")

    def _send(
        self,
        server: str,
        header: Header,
        payload: memoryview | bytes = b"",
        memory: SharedMemory | None = None,
    ) -> None:
        connection = self._connections.get(server)
        if connection is None:
            return  # lost since the last pump, which will have told the caller
        try:
            waits = connection.send_now(header, payload, memory)
        except Disconnected:
            # Not told here, in the middle of backward: the next pump finds the closed socket and tells.
            self._log.debug("lost a server while sending", server=server)
            waits = True
        if waits:
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


def _with_note(header: Header, note: GradientNote, marks: bytes) -> Header:
    """Say in the header of a push what is said of the gradient; ``marks`` follow all else."""
    flags = header.flags | (Flag.ABSENT if marks else Flag.NONE)
    return header._replace(length=header.length + len(marks), flags=flags, weight=note.weight)


def is_about_plan(reason: Reason) -> bool:
    """Whether a refusal means that the plan of one of the two is old: read it again."""
    return reason in (Reason.STALE, Reason.NOT_HOLDER, Reason.NOT_OWNER)
