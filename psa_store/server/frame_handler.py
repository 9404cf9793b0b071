"""What a server does with the frames of its connections: where a payload goes, and which part of it is concerned.

Used by the event loop's thread only.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import numpy as np

from psa_store.cluster import Plan
from psa_store.consistency.instructions import NormsTold, RankCut
from psa_store.errors import Refused
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.slots import AVERAGE
from psa_store.server.aggregator import Aggregator, rules_of
from psa_store.server.clients import Client, SharedParameters
from psa_store.server.connections import Connections, HasFileno
from psa_store.server.entrance import Limits
from psa_store.server.introductions import Introductions
from psa_store.server.messages import PeerGone
from psa_store.server.push_admission import PushAdmission
from psa_store.server.relay import CellRelay
from psa_store.server.waiters import Waiters
from psa_store.testing.journal import Journal
from psa_store.wire import (
    DISCARD,
    PARK,
    Connection,
    Door,
    Flag,
    Header,
    Kind,
    PassedMemory,
    Place,
    Reason,
    Refusal,
    Report,
    SharedMemory,
    decode,
    encode,
)

_NOTHING = memoryview(b"")
_OUTSIDE_TERMS = frozenset({Kind.HELLO, Kind.WELCOME, Kind.INSPECT, Kind.REFUSED})
_BEFORE_HELLO = frozenset({Kind.HELLO, Kind.INSPECT})
_REQUESTS = frozenset({Kind.PULL, Kind.AWAIT, Kind.NORM, Kind.FINISH, Kind.CLOCKS, Kind.CUT, Kind.WANT})
"""What members ask of a server, and what servers tell each other, besides gradients."""
_OF_A_RANK = frozenset({Kind.AWAIT, Kind.CUT})
_MEMBERS = _REQUESTS | {Kind.SHARE, Kind.PUSH, Kind.RELAY}
"""Frames that only a process that said HELLO may send; all but SHARE belong to a term."""
_NUMBER_BYTES = 8
_WAITING_MIN = 256
_WAITING_PER_STATE = 4
"""A worker pulls each shard, and the state of each rank in it, and again where plans follow each other fast."""


class FrameHandler:
    """The host of the connections. ``aggregator`` is None while no term is served: what belongs to one is parked."""

    def __init__(
        self,
        *,
        member: str,
        config: JobConfig,
        layout: Layout,
        wire: WireLayout,
        listeners: Sequence[socket.socket],
        wake: HasFileno,
        journal: Journal,
        peer_gone: Callable[[PeerGone], None],
        door: Door,
        limits: Limits,
        refused: Callable[[], None],
    ) -> None:
        self.aggregator: Aggregator | None = None
        self.peers: dict[str, Connection] = {}
        """The other servers of the plan, by name."""
        self.connections = Connections(self, listeners, wake, door, limits, refused)
        self.parameters = SharedParameters(SharedMemory.create("parameters", 0))
        self.waiters = Waiters(
            self.connections,
            self.parameters,
            journal,
            shows_parameters=config.shares_parameters,
            waiting_max=_WAITING_MIN + _WAITING_PER_STATE * len(layout.shards) * (config.ranks + 1),
        )
        self.relay = CellRelay(self.connections, config.microbatches)
        self._layout = layout
        self._wire = wire
        self._ranks = config.ranks
        self._gradients_max = config.ranks * config.window * config.stages
        self._peer_gone = peer_gone
        self._admission = PushAdmission(config, layout, wire, rules_of(config))
        self._introductions = Introductions(member, config, layout.fingerprint, self.connections, self.parameters)

    @property
    def member(self) -> str:
        """The present name of this server."""
        return self._introductions.member

    # --- terms

    def begin(self, member: str, memory: SharedMemory, aggregator: Aggregator) -> None:
        """Serve this term. ``memory``: where its parameters are published."""
        self._introductions.member = member
        self.parameters.move_to(memory)
        self.aggregator = aggregator

    def revise(self, plan: Plan, version: int) -> None:
        """The same term, but other ranks or another phase. ``version``: the newest."""
        self._admission.revise(plan, version)
        self.connections.wake_parked()

    def end(self) -> None:
        """Serve nothing; afterwards no connection touches the memory of the old term."""
        self._admission.end()
        self.connections.detach_all()
        for peer in list(self.peers.values()):
            self.connections.close(peer)
        self.waiters.clear()
        self.relay.clear()
        self.aggregator = None

    def add_peer(self, server: str, sock: socket.socket) -> None:
        """Take over a socket that leads to another server of the plan."""
        if self.aggregator is None:
            sock.close()
            return
        peer = self.peers[server] = self._introductions.introduce(sock, server)
        self.aggregator.send_state(peer)

    # --- frames, as the connections ask

    def admit(self, connection: Connection, header: Header) -> Place:
        """Name the place of a payload. What belongs to a term or a plan that is yet to come has to wait for it."""
        kind, aggregator = header.kind, self.aggregator
        if not connection.member and kind not in _BEFORE_HELLO:
            raise Refused(f"{kind.name} before HELLO" if kind in _MEMBERS else f"a server takes no {kind.name}")
        if kind in _OUTSIDE_TERMS:
            return memoryview(bytearray(header.length))
        if kind not in _MEMBERS:
            raise Refused(f"a server takes no {kind.name}")
        if kind is Kind.SHARE:
            return _NOTHING
        if aggregator is None or (header.term, header.revision) > (aggregator.plan.term, aggregator.plan.revision):
            return PARK
        if kind is Kind.PUSH:
            return self._admission.admit(aggregator, connection, self.parameters.clients.get(connection), header)
        if kind is Kind.RELAY and not self._wants(aggregator, connection, header):
            return DISCARD
        return memoryview(bytearray(header.length)) if header.length else _NOTHING

    def on_frame(self, connection: Connection, header: Header, payload: memoryview) -> None:
        kind, aggregator = header.kind, self.aggregator
        client = self.parameters.clients.get(connection)
        if kind is Kind.PUSH:
            reason = self._admission.finish(aggregator, connection, header)
            if reason is not Reason.NONE:
                self._refuse(connection, header, reason, f"push refused: {reason.name}")
        elif kind is Kind.RELAY:
            self._on_relay(aggregator, connection, header, payload)
        elif kind in _REQUESTS:
            if aggregator is not None:
                self._on_request(aggregator, connection, client, header, payload)
        elif kind is Kind.HELLO:
            self._introductions.on_hello(connection, payload)
        elif kind is Kind.SHARE:
            if client is None:
                raise Refused("only a worker that said HELLO may do that")
            client.share(header.memory, self._layout, self._wire, self._gradients_max)
        elif kind is Kind.INSPECT:
            text = encode(self._report())
            self.connections.send(connection, Header(Kind.REPORT, length=len(text)), text)
        elif kind is Kind.REFUSED:
            raise Refused(f"a peer refused: {decode(Refusal, payload).why}")

    def _wants(self, aggregator: Aggregator, connection: Connection, header: Header) -> bool:
        """Whether the payload of RELAY is worth its memory; if not, it is refused as soon as it has come.

        Raises:
            Refused: no correct worker sends this.
        """
        if header.term < aggregator.plan.term:
            return False
        return self.relay.judge(aggregator.plan, aggregator.version, connection, header)[0] is Reason.NONE

    def _on_relay(
        self, aggregator: Aggregator | None, connection: Connection, header: Header, payload: memoryview
    ) -> None:
        """Keep what a cell sends; its memory is taken over in any case, since the next frame may bring some, too."""
        descriptor = connection.take_descriptor()
        memory = None if descriptor is None else PassedMemory(descriptor)
        if aggregator is None:
            return  # the term has ended while the payload came
        reason, why = Reason.STALE, "the term is over"
        if header.term == aggregator.plan.term:
            reason, why = self.relay.put(aggregator.plan, aggregator.version, connection, header, payload, memory)
        if reason is not Reason.NONE:
            self._refuse(connection, header, reason, why)

    def _on_request(
        self, aggregator: Aggregator, connection: Connection, client: Client | None, header: Header, payload: memoryview
    ) -> None:
        """Carry out a request, or note it for later; one that does not fit the plan is refused."""
        plan, kind = aggregator.plan, header.kind
        if kind in _OF_A_RANK and header.rank >= self._ranks:
            raise Refused(f"{kind.name} of rank {header.rank}, and there are {self._ranks}")
        if header.term < plan.term:
            if kind is not Kind.NORM:  # that was said before the other server knew
                self._refuse(connection, header, Reason.STALE, "the term is over")
        elif kind is Kind.AWAIT:
            if client is None:
                raise Refused("only a worker that said HELLO may do that")
            self.waiters.wait(client, header, at_once=aggregator.may_answer(header))
        elif kind is Kind.WANT:
            self.relay.want(plan, aggregator.version, connection, header)
        elif kind is Kind.NORM:
            aggregator.on_norms(_norms(plan, connection, header, payload))
        elif kind is Kind.FINISH:
            self.waiters.finish(connection, header)
        elif kind is Kind.CLOCKS:
            aggregator.send_clocks(connection)
        elif kind is Kind.PULL:
            owned = aggregator.owned_shards.get(header.shard)
            if owned is None:
                self._refuse(connection, header, Reason.NOT_OWNER, f"shard {header.shard} is owned elsewhere")
            elif header.flags & Flag.AVERAGE and AVERAGE not in owned.slots:
                self._refuse(connection, header, Reason.WRONG, f"shard {header.shard} has no average")
            else:
                self.waiters.pull(connection, header)
        elif kind is Kind.CUT:
            if plan.holder(header.rank) == connection.member:
                aggregator.on_rank_cut(RankCut(header.barrier, header.rank, header.step))
            else:
                self._refuse(connection, header, Reason.NOT_HOLDER, f"rank {header.rank} is held by another worker")

    def on_stranger(self, connection: Connection, why: str) -> None:
        self._refuse(connection, Header(Kind.HELLO), Reason.WRONG, why)

    def on_gone(self, connection: Connection) -> None:
        self._admission.forget(connection)
        self.waiters.forget(connection)
        self.relay.forget(connection)
        self.parameters.clients.pop(connection, None)
        if connection.member and self.peers.get(connection.member) is connection:
            del self.peers[connection.member]
            if self.aggregator is not None:
                self._peer_gone(PeerGone(self.aggregator.plan.term, connection.member))

    def _refuse(self, connection: Connection, header: Header, reason: Reason, why: str) -> None:
        text = encode(Refusal(header.kind.name, why))
        term, revision = (self.aggregator.plan.term, self.aggregator.plan.revision) if self.aggregator else (0, 0)
        answer = Header(Kind.REFUSED, term, revision, header.step, header.rank, header.shard, len(text), reason)
        self.connections.send(connection, answer, text)

    def _report(self) -> Report:
        aggregator = self.aggregator
        if aggregator is None:
            return Report(self.member, None, "idle", None, None, 0)
        return Report(
            self.member,
            aggregator.plan.term,
            aggregator.stage,
            aggregator.version,
            aggregator.committed,
            len(aggregator.owned_shards),
            aggregator.untouched,
        )


def _norms(plan: Plan, connection: Connection, header: Header, payload: memoryview) -> NormsTold:
    if header.length % (2 * _NUMBER_BYTES):
        raise Refused(f"NORM of {header.length} bytes: not pairs of numbers")
    pairs = np.frombuffer(payload, dtype="<f8").reshape(-1, 2)
    norms = {int(shard): float(norm) for shard, norm in pairs if np.isfinite(shard)}
    if not norms.keys() <= set(plan.shards_of(connection.member)):
        raise Refused(f"NORM of shards that {connection.member} does not own")
    return NormsTold(header.step, norms)
