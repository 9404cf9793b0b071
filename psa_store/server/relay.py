"""The relay of a server: keeps what cells send each other in a step, and hands it on.

Within a host it keeps descriptors, and never touches the memory behind them; what comes by value goes out by value.
Used by the event loop's thread only.
"""

from __future__ import annotations

from dataclasses import dataclass

from psa_store.cluster import Cell, Plan
from psa_store.consistency.relay import Address, Relay
from psa_store.errors import Refused
from psa_store.server.connections import Connections
from psa_store.wire import RELAY_HEAD, Connection, Flag, Header, Kind, PassedMemory, Reason
from psa_store.wire.frames import PAYLOAD_BYTES_MAX


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """``payload``: a description of the tensors; after it their bytes, if they are not in ``memory``."""

    header: Header
    payload: bytes
    memory: PassedMemory | None

    def whole(self) -> bytes:
        """As it goes by value."""
        if self.memory is None:
            return self.payload
        _, size_bytes = RELAY_HEAD.unpack_from(self.payload)
        return self.payload + self.memory.attach().buffer[:size_bytes]

    def is_like(self, other: _Item) -> bool:
        """Whether both are the same tensors, however they came."""
        return self.whole() == other.whole()


class CellRelay:
    """Executes what :class:`psa_store.consistency.relay.Relay` decides. ``microbatches``: in how many a batch is."""

    def __init__(self, connections: Connections, microbatches: int) -> None:
        self._connections = connections
        self._microbatches = microbatches
        self._relay: Relay[_Item, Connection] = Relay()

    def __len__(self) -> int:
        return len(self._relay)

    def judge(self, plan: Plan, version: int, connection: Connection, header: Header) -> tuple[Reason, str]:
        """Say what is to be refused, with only its header in hand, and for what. ``version``: the newest here.

        Raises:
            Refused: no correct worker sends this.
        """
        if header.microbatch >= self._microbatches + (2 * plan.stages if header.flags & Flag.BACKWARD else 0):
            raise Refused(f"RELAY of micro-batch {header.microbatch}, and there are {self._microbatches}")
        _check_step(header, version)
        sender = self._sender(plan, header)
        if not (0 <= sender < plan.stages and header.stage < plan.stages and header.rank < plan.ranks):
            raise Refused(f"RELAY for stage {header.stage} of rank {header.rank}: there is none")
        if plan.holder(header.rank, sender, header.step) != connection.member:
            return Reason.NOT_HOLDER, f"stage {sender} of rank {header.rank} is held by another worker"
        return Reason.NONE, ""

    def put(
        self,
        plan: Plan,
        version: int,
        connection: Connection,
        header: Header,
        payload: memoryview,
        memory: PassedMemory | None,
    ) -> tuple[Reason, str]:
        """Keep what a cell sends, and hand it on; returns what to refuse it for.

        The plan may have changed since the header came: it is judged again. ``payload`` is empty if it was discarded.

        Raises:
            Refused: no correct worker sends this.
        """
        if bool(header.flags & Flag.BY_REFERENCE) is not (memory is not None):
            raise Refused("RELAY by reference comes with a descriptor, and by value without one")
        if memory is not None:
            memory.check(PAYLOAD_BYTES_MAX)
        reason, why = self.judge(plan, version, connection, header)
        if reason is not Reason.NONE:
            return reason, why
        sender, backward = self._sender(plan, header), bool(header.flags & Flag.BACKWARD)
        if len(payload) < header.length:
            return Reason.NOT_HOLDER, f"stage {sender} of rank {header.rank} was held by another worker when this came"
        if len(payload) < RELAY_HEAD.size:
            raise Refused("RELAY without a description of what it brings")
        item = _Item(header, bytes(payload), memory)
        address = Address(header.step, Cell(header.rank, header.stage), header.microbatch, backward)
        readers, former = self._relay.put(address, item)
        if former is not None and not former.is_like(item):
            return Reason.WRONG, (
                f"stage {sender} of rank {header.rank} was computed twice in step {header.step}, with other results: "
                "it must be a function of its parameters, its batch and the random numbers that it is given"
            )
        for reader in readers:
            self._send(plan, reader, item)
        return Reason.NONE, ""

    def want(self, plan: Plan, version: int, connection: Connection, header: Header) -> None:
        """A worker computes a cell: send it what is here for it, and from now on what comes.

        Raises:
            Refused: no correct worker sends this.
        """
        if header.stage >= plan.stages or header.rank >= plan.ranks:
            raise Refused(f"WANT of stage {header.stage} of rank {header.rank}: there is none")
        _check_step(header, version)
        if header.step < version:
            self._tell_over(plan, version, connection)
        for _, item in self._relay.want(header.step, Cell(header.rank, header.stage), connection):
            self._send(plan, connection, item)

    def advance(self, plan: Plan, version: int) -> None:
        """A version is made: nothing of the steps before is needed any more."""
        for reader in self._relay.advance(version):
            self._tell_over(plan, version, reader)

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""
        self._relay.forget(connection)

    def clear(self) -> None:
        """The term is over: its cells are computed again."""
        self._relay = Relay()

    def _sender(self, plan: Plan, header: Header) -> int:
        """The stage from which it comes."""
        if not header.flags & Flag.BACKWARD:
            return header.stage - 1
        if header.microbatch >= self._microbatches:
            # Its part in the gradient of parameters that both have; behind those, that the stage is to run ahead.
            return (header.microbatch - self._microbatches) % plan.stages
        return header.stage + 1

    def _tell_over(self, plan: Plan, version: int, reader: Connection) -> None:
        self._connections.send(reader, Header(Kind.WANT, plan.term, plan.revision, version))

    def _send(self, plan: Plan, reader: Connection, item: _Item) -> None:
        header = item.header._replace(term=plan.term, revision=plan.revision)
        if item.memory is None or reader.is_local:
            self._connections.send(reader, header, item.payload, memory=item.memory)
        else:
            whole = item.whole()
            flags = header.flags & ~Flag.BY_REFERENCE
            self._connections.send(reader, header._replace(flags=flags, length=len(whole)), whole)


def _check_step(header: Header, version: int) -> None:
    """A worker may know of one version more than a server that owns nothing that changes."""
    if header.step > version + 1:
        raise Refused(f"{header.kind.name} for step {header.step} while version {version} is the newest")
