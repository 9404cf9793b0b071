"""The event loop of a server: takes gradients in, hands new versions out.

One thread owns the term's course (what becomes of gradients, see ``aggregator``) and, through reception, all
connections; the threads of arithmetic reduce and update; the committer writes to Redis; control (another thread)
tells which shards to own. They talk through mailboxes only, so nothing in here needs a lock.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from psa_store import logs
from psa_store.cluster import Plan
from psa_store.compression.codec import decode
from psa_store.consistency import Offer
from psa_store.errors import Refused
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.job.wire_layout import WireLayout
from psa_store.observe.metrics import Metrics
from psa_store.optim import Optimizer
from psa_store.optim.rank_state import rank_state_of
from psa_store.optim.tensors import as_bytes
from psa_store.server.aggregator.async_ import AsyncAggregator
from psa_store.server.aggregator.base import Aggregator, Tools
from psa_store.server.aggregator.sync import SyncAggregator
from psa_store.server.arithmetic import Arithmetic
from psa_store.server.client import Client
from psa_store.server.committer import Committer
from psa_store.server.connections import Connections
from psa_store.server.messages import (
    Applied,
    CannotServe,
    Committed,
    Join,
    Lost,
    Measured,
    Moved,
    PeerGone,
    Quit,
    Release,
    Released,
    Revise,
    Serve,
    Snapped,
    ToEventLoop,
    ToPlanFollower,
    Updated,
)
from psa_store.server.shard import OwnedShard
from psa_store.server.shared_parameters import SharedParameters
from psa_store.server.waiters import Waiters
from psa_store.testing.journal import Journal
from psa_store.wire import (
    PARK,
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
    decode_text,
    encode_text,
)

_TICK_S = 0.2
_NOTHING = memoryview(b"")
_NUMBER_BYTES = 8
_MEMBER = re.compile(r"[!-~]+")
_LAPSED_PAUSE_S = 0.02
_OF_MEMBERS = frozenset({Kind.SHARE, Kind.PUSH, Kind.PULL, Kind.AWAIT, Kind.NORM, Kind.FINISH, Kind.CLOCKS, Kind.CUT})
"""Frames that only who said HELLO may send; all but SHARE belong to a term."""


class EventLoop:
    """Owns the thread ``psa-event_loop``. Everybody else talks to it through :meth:`post`."""

    IDLE = "idle"

    def __init__(
        self,
        *,
        member: str,
        config: JobConfig,
        layout: Layout,
        optimizer: Optimizer,
        threads: int,
        listeners: Sequence[socket.socket],
        lease_left_s: Callable[[], float],
        make_committer: Callable[[Callable[[Committed | Lost], None]], Committer],
        report: Callable[[ToPlanFollower], None],
        journal: Journal,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self.turned_s = time.monotonic()
        """When the loop turned last."""
        self._member = member
        self._config = config
        self._layout = layout
        self._wire = WireLayout(layout, config.compression)
        self._lease_left_s = lease_left_s
        self._report = report
        self._log = logs.get_logger()
        self._mailbox: Mailbox[ToEventLoop] = Mailbox()
        self._committer = make_committer(self._mailbox.post)
        self._arithmetic = Arithmetic(threads, self._mailbox.post)
        self._connections = Connections(self, listeners, self._mailbox)
        self._shared_parameters = SharedParameters(SharedMemory.create(member, 0))
        self._pending = Waiters(self._connections, self._wire, journal)
        self._peers: dict[str, Connection] = {}
        self._tools = Tools(
            config=config,
            layout=layout,
            optimizer=optimizer,
            arithmetic=self._arithmetic,
            committer=self._committer,
            shared_parameters=self._shared_parameters,
            pending=self._pending,
            connections=self._connections,
            peers=self._peers,
            journal=journal,
            metrics=metrics,
            report=report,
            post=self._mailbox.post,
        )
        self._memories_max = config.ranks * config.window
        self._frozen = {shard.index for shard in layout.shards_of(TensorRole.FROZEN)}
        states = {shard.index: rank_state_of(config, shard) for shard in layout.shards}
        self._states = {shard: state for shard, state in states.items() if state is not None}
        """By shard, what ranks carry."""
        sizes = [
            max(shard.size_bytes, config.compression.payload_bytes(shard.numel))
            + (self._states[shard.index].size_bytes if shard.index in self._states else 0)
            for shard in layout.shards
        ]
        self._scratch = memoryview(bytearray(max(sizes)))
        self._aggregator: Aggregator | None = None
        """None: no term to serve; everything that belongs to one is parked."""
        self._receiving: dict[tuple[int, int, str], Connection] = {}
        self._dropping: dict[Connection, Reason] = {}
        self._encoded: dict[Connection, bytearray] = {}
        """Where a push arrives that is not a gradient as it is."""
        self._lapsed = False
        self._is_first = False
        """Whether the plan that we served last names us first."""
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="psa-event loop")

    # --- for the other threads

    def start(self) -> None:
        self._thread.start()

    def post(self, message: ToEventLoop) -> None:
        self._mailbox.post(message)

    def close(self) -> None:
        """Stop serving and release every thread and descriptor."""
        self.post(Quit())
        self._thread.join()
        self._committer.close()
        self._arithmetic.close()
        self._mailbox.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # --- for the monitor: any thread may look

    @property
    def stage(self) -> str:
        """What is going on; IDLE: there is no term to serve."""
        aggregator = self._aggregator
        return aggregator.stage if aggregator is not None else self.IDLE

    @property
    def finished(self) -> int | None:
        """The version with which the job ended, in the server that the plan names first; None elsewhere and before."""
        return self._pending.finished if self._is_first else None

    @property
    def traffic(self) -> Traffic:
        return self._connections.traffic

    # --- the loop

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.failure = error  # a bug: control raises it, so that the process ends and is seen to have failed
        finally:
            self._drop_term()
            self._connections.close_all()

    def _turn(self) -> bool:
        """One turn of the loop; False at the end."""
        self.turned_s = time.monotonic()
        events = self._connections.wait(_TICK_S)
        lapsed = self._lease_left_s() <= 0
        if lapsed is not self._lapsed:
            # ZooKeeper may have declared us dead meanwhile: neither read nor answer until it is heard again.
            self._lapsed = lapsed
            self._log.warning("ZooKeeper is silent: not serving" if lapsed else "ZooKeeper is heard: serving")
        if lapsed:
            time.sleep(_LAPSED_PAUSE_S)
            events = []
        self._connections.serve(events)
        for message in self._mailbox.drain():
            if isinstance(message, Quit):
                return False
            self._handle(message)
        if not lapsed and self._aggregator is not None:
            self._aggregator.advance()
        return True

    def _handle(self, message: ToEventLoop) -> None:
        match message:
            case Release():
                self._release(message.term)
            case Serve():
                self._serve(message)
            case Revise():
                self._revise(message.plan)
            case Join():
                self._add_peer(message.server, message.sock)
            case _ if self._aggregator is None or message.term != self._aggregator.plan.term:  # type: ignore[union-attr]
                pass  # an answer from the pool or the committer that comes after its term
            case Committed():
                self._aggregator.on_committed(message)
            case Lost():
                self._log.error("lost the shards of this term", term=message.term, why=message.why)
                self._report(CannotServe(message.term, message.why))
                self._drop_term()
            case Measured() | Updated() | Applied() | Moved() | Snapped():
                self._aggregator.handle(message)

    # --- terms

    def _release(self, term: int) -> None:
        aggregator = self._aggregator
        version = None if aggregator is None else aggregator.stands_at
        owned_shards = aggregator.owned_shards if aggregator is not None and aggregator.committed == version else {}
        self._drop_term()
        self._committer.begin(term)
        self._report(Released(-1 if version is None else version, owned_shards))

    def _drop_term(self) -> None:
        """Serve nothing; afterwards no thread touches the memory of the old term but an unfinished commit."""
        self._arithmetic.settle()
        if self._aggregator is not None:
            self._aggregator.end()
        for (shard, rank, _), connection in self._receiving.items():
            self._log.debug("diverting a push of the old term", shard=shard, rank=rank)
            connection.divert(self._scratch)
            self._dropping[connection] = Reason.STALE
        self._connections.detach_all()
        for peer in list(self._peers.values()):
            self._connections.close(peer)
        self._receiving.clear()
        self._pending.clear()
        self._aggregator = None
        self._metrics.set("shards", 0)

    def _serve(self, message: Serve) -> None:
        plan = message.plan
        self._member = message.member
        if plan.servers:
            self._is_first = plan.servers[0].id == message.member
        self._shared_parameters.move_to(message.memory)
        aggregator_of = AsyncAggregator if self._config.mode.on_arrival else SyncAggregator
        self._aggregator = aggregator = aggregator_of(self._tools, plan, dict(message.owned_shards))
        for server, sock in message.peers.items():
            self._add_peer(server, sock)
        self._tools.journal.record(
            "serving",
            term=plan.term,
            resume=plan.resume,
            member=self._member,
            shards=list(aggregator.owned_shards),
            trained=[owned.shard.index for owned in aggregator.trained],
            clocks={i: owned.clocks for i, owned in aggregator.versioned.items() if owned.clocks},
        )
        self._metrics.set("term", plan.term)
        self._metrics.set("shards", len(aggregator.owned_shards))
        self._log.info("serving", term=plan.term, version=plan.resume, shards=len(aggregator.owned_shards))
        self._connections.wake_parked()

    def _revise(self, plan: Plan) -> None:
        if self._aggregator is None or plan.term != self._aggregator.plan.term:
            return
        self._aggregator.revise(plan)
        for (shard, rank, member), connection in list(self._receiving.items()):
            if not self._may_push(plan, rank, connection):
                connection.divert(self._scratch)
                self._dropping[connection] = Reason.NOT_HOLDER
                del self._receiving[shard, rank, member]
        self._connections.wake_parked()

    # --- connections

    def on_gone(self, connection: Connection) -> None:
        self._dropping.pop(connection, None)
        self._encoded.pop(connection, None)
        self._receiving = {k: v for k, v in self._receiving.items() if v is not connection}
        self._pending.forget(connection)
        self._shared_parameters.clients.pop(connection, None)
        for server, peer in list(self._peers.items()):
            if peer is connection:
                del self._peers[server]
                if self._aggregator is not None:
                    self._report(PeerGone(self._aggregator.plan.term, server))

    def on_stranger(self, connection: Connection, why: str) -> None:
        self._refuse(connection, Header(Kind.HELLO), Reason.WRONG, why)

    def _refuse(self, connection: Connection, header: Header, reason: Reason, text: str) -> None:
        payload = encode_text({"kind": header.kind.name, "why": text})
        plan = self._aggregator.plan if self._aggregator is not None else None
        answer = Header(
            Kind.REFUSED,
            plan.term if plan else 0,
            plan.revision if plan else 0,
            header.step,
            header.rank,
            header.shard,
            len(payload),
            reason,
        )
        self._connections.send(connection, answer, payload)

    def _add_peer(self, server: str, sock: socket.socket) -> None:
        if self._aggregator is None:
            sock.close()
            return
        connection = self._connections.add(sock, server)
        connection.member = server
        self._peers[server] = connection
        hello = encode_text(
            {
                "protocol": PROTOCOL,
                "job": self._config.name,
                "layout": self._layout.fingerprint,
                "member": self._member,
            }
        )
        self._connections.send(connection, Header(Kind.HELLO, length=len(hello)), hello)
        self._aggregator.send_state(connection)

    # --- frames

    def admit(self, connection: Connection, header: Header) -> memoryview | Park:
        """Judge a frame by its header: where its payload goes, or that it must wait for a newer plan."""
        match header.kind:
            case Kind.HELLO | Kind.WELCOME | Kind.INSPECT | Kind.REFUSED:
                return memoryview(bytearray(header.length))
            case _ if header.kind in _OF_MEMBERS and not connection.member:
                raise Refused(f"{header.kind.name} before HELLO")
            case Kind.SHARE:
                return _NOTHING
            case _ if header.kind in _OF_MEMBERS:
                aggregator = self._aggregator
                if aggregator is None or (header.term, header.revision) > (
                    aggregator.plan.term,
                    aggregator.plan.revision,
                ):
                    return PARK
                if header.kind is Kind.PUSH:
                    return self._admit_push(aggregator, connection, header)
                return memoryview(bytearray(header.length))
        raise Refused(f"a server takes no {header.kind.name}")

    def _admit_push(self, aggregator: Aggregator, connection: Connection, header: Header) -> memoryview | Park:
        """Judge a gradient: by value, its place, or scratch memory if it is not wanted; by reference, nothing comes.

        Where pushes are applied on arrival, one that comes while an earlier one of its rank waits has to wait for that.
        """
        if header.flags & Flag.BY_REFERENCE:
            if not 0 < header.count <= len(self._layout.shards) - header.shard:
                raise Refused(f"PUSH of {header.count} shards from shard {header.shard}: there are not so many")
        else:
            header = replace(header, count=1)
        reason = self._reason_against(aggregator, connection, header)
        if reason is None and self._must_wait(aggregator, header):
            return PARK
        if header.flags & Flag.BY_REFERENCE:
            return _NOTHING
        if reason is None:
            owned = aggregator.owned_shards[header.shard]
            gradient_bytes, state_bytes = self._push_bytes(owned, header)
            if header.length != gradient_bytes + state_bytes:
                raise Refused(
                    f"PUSH of {header.length} bytes for shard {header.shard} of {gradient_bytes + state_bytes}"
                )
            if self._is_new(aggregator, header, header.shard):
                self._divert_former(header.shard, header.rank, connection)
                self._receiving[self._receiving_key(header.shard, header.rank, connection)] = connection
                if not self._compresses(owned) and not state_bytes and not self._config.mode.speculate:
                    return as_bytes(owned.own_place(header.rank))
                self._encoded[connection] = bytearray(header.length)
                return memoryview(self._encoded[connection])
            reason = Reason.NONE
        if header.length > len(self._scratch):
            raise Refused(f"PUSH of {header.length} bytes; no shard is larger than {len(self._scratch)}")
        self._dropping[connection] = reason
        return self._scratch[: header.length]

    def _push_bytes(self, owned: OwnedShard, header: Header) -> tuple[int, int]:
        """What a push of this shard has to bring: bytes of gradient (or buffers), bytes of a rank's state."""
        state = self._states.get(owned.shard.index)
        due = bool(header.flags & Flag.STATE) or self._config.rank_state_is_due(header.step + 1)
        state_bytes = state.size_bytes if state is not None and due else 0
        if owned.shard.role is TensorRole.TRAINED and not self._config.mode.exchanges(owned.shard.index, header.step):
            return 0, state_bytes
        if self._compresses(owned):
            return self._config.compression.payload_bytes(owned.shard.numel), state_bytes
        return self._wire.size_bytes(owned.shard), state_bytes

    def _compresses(self, owned: OwnedShard) -> bool:
        """Whether gradients of this shard come encoded."""
        return owned.shard.role is TensorRole.TRAINED and self._config.compression.applies_to(owned.shard.dtype)

    def _reason_against(self, aggregator: Aggregator, connection: Connection, header: Header) -> Reason | None:
        if header.flags & Flag.NONFINITE and (not self._config.skip_nonfinite or self._config.mode.in_rounds):
            raise Refused("PUSH of a gradient with NaN or Inf, which this job does not skip")
        if header.term < aggregator.plan.term:
            return Reason.STALE
        if any(shard not in aggregator.owned_shards for shard in range(header.shard, header.shard + header.count)):
            return Reason.NOT_OWNER
        if header.rank >= self._config.ranks or not self._may_push(aggregator.plan, header.rank, connection):
            return Reason.NOT_HOLDER
        frozen = self._frozen.intersection(range(header.shard, header.shard + header.count))
        if frozen:
            raise Refused(f"PUSH of shards {sorted(frozen)}, which never change")
        return None

    def _may_push(self, plan: Plan, rank: int, connection: Connection) -> bool:
        """Whether the plan gives this rank to this worker, or allows it to be faster."""
        return plan.ranks[rank] == connection.member or (
            self._config.mode.speculate and connection.member in plan.ranks
        )

    def _must_wait(self, aggregator: Aggregator, header: Header) -> bool:
        """Whether earlier pushes of this rank have to be applied first. Raises Refused where none can be missing."""
        shards = range(header.shard, header.shard + header.count)
        if all(aggregator.offer(header, shard) is not Offer.AHEAD for shard in shards):
            return False
        if not self._config.mode.on_arrival:
            raise Refused(f"PUSH for step {header.step} while version {aggregator.version} is the newest")
        return True

    def _is_new(self, aggregator: Aggregator, header: Header, shard: int) -> bool:
        """Whether a gradient is wanted; False if we have it or its step is over."""
        return aggregator.offer(header, shard) is Offer.NEW

    def _receiving_key(self, shard: int, rank: int, connection: Connection) -> tuple[int, int, str]:
        """What is received once at a time: where two workers may race with a gradient, once from each of them."""
        return shard, rank, connection.member if self._config.mode.speculate else ""

    def _divert_former(self, shard: int, rank: int, connection: Connection) -> None:
        """The same gradient is being received already: what is still to come of it is not wanted."""
        former = self._receiving.pop(self._receiving_key(shard, rank, connection), None)
        if former is not None:
            former.divert(self._scratch)
            self._dropping[former] = Reason.NONE

    def on_frame(self, connection: Connection, header: Header, payload: memoryview) -> None:
        match header.kind:
            case Kind.HELLO:
                self._on_hello(connection, decode_text(payload))
            case Kind.SHARE:
                self._client_of(connection).share(header.memory, self._wire, self._memories_max)
            case Kind.PUSH if header.flags & Flag.BY_REFERENCE:
                self._on_push_by_reference(connection, header)
            case Kind.PUSH:
                self._on_push(connection, header)
            case Kind.PULL | Kind.AWAIT | Kind.FINISH | Kind.CLOCKS | Kind.CUT:
                self._on_request(connection, header)
            case Kind.NORM:
                if self._aggregator is not None and header.term == self._aggregator.plan.term:
                    self._on_norms(self._aggregator, connection, header, payload)
            case Kind.INSPECT:
                text = encode_text(self._inspect())
                self._connections.send(connection, Header(Kind.REPORT, length=len(text)), text)
            case Kind.REFUSED:
                raise Refused(f"a peer refused us: {decode_text(payload).get('why')}")
            case _:
                pass

    def _on_norms(self, aggregator: Aggregator, connection: Connection, header: Header, payload: memoryview) -> None:
        if header.length % (2 * _NUMBER_BYTES):
            raise Refused(f"NORM of {header.length} bytes: not pairs of numbers")
        pairs = np.frombuffer(payload, dtype="<f8").reshape(-1, 2)
        norms = {int(shard): float(norm) for shard, norm in pairs if np.isfinite(shard)}
        if not norms.keys() <= set(aggregator.plan.shards_of(connection.member)):
            raise Refused(f"NORM of shards that {connection.member} does not own")
        aggregator.on_norms(header.step, norms)

    def _on_hello(self, connection: Connection, hello: dict[str, object]) -> None:
        for what, mine in (
            ("protocol", PROTOCOL),
            ("job", self._config.name),
            ("layout", self._layout.fingerprint),
        ):
            if hello.get(what) != mine:
                raise Refused(f"{what} is {mine!r} here and {hello.get(what)!r} there")
        member = str(hello.get("member", ""))
        if connection.member or not _MEMBER.fullmatch(member):
            raise Refused("HELLO from nobody, or for the second time")
        for other in [each.connection for each in self._shared_parameters.clients.values() if each.member == member]:
            self._connections.close(other)  # its owner has left it: one member has one connection
        connection.member = connection.peer = member
        by_reference = connection.is_local and bool(hello.get("by_reference"))
        if not self._config.shares_memory and "by_reference" in hello:
            connection.be_patient()  # a worker that computes does not read, for as long as its step takes
        self._shared_parameters.clients[connection] = Client(connection, member, by_reference)
        text = encode_text({"server": self._member})
        self._connections.send(connection, Header(Kind.WELCOME, length=len(text)), text)

    def _on_push(self, connection: Connection, header: Header) -> None:
        encoded = self._encoded.pop(connection, None)
        reason = self._dropping.pop(connection, None)
        if reason is not None:
            if reason is not Reason.NONE:
                self._refuse(connection, header, reason, f"push refused: {reason.name}")
            return
        assert self._aggregator is not None
        assert self._receiving.pop(self._receiving_key(header.shard, header.rank, connection)) is connection
        if not self._is_new(self._aggregator, header, header.shard):
            return  # the step went on without it, or somebody else was faster
        owned = self._aggregator.owned_shards[header.shard]
        if encoded is None:
            self._aggregator.accept(header, header.shard, owned.own_place(header.rank))
            return
        gradient_bytes, state_bytes = self._push_bytes(owned, header)
        payload = torch.frombuffer(encoded, dtype=torch.uint8)
        gradient = self._decoded(owned, header.rank, payload[:gradient_bytes]) if gradient_bytes else None
        self._aggregator.accept(
            header, header.shard, gradient, payload[gradient_bytes:].clone() if state_bytes else None
        )

    def _decoded(self, owned: OwnedShard, rank: int, payload: torch.Tensor) -> torch.Tensor:
        """A gradient in its place, from what came of it."""
        place = owned.own_place(rank)
        if self._compresses(owned):
            decode(self._config.compression, payload, place)
        else:
            place.view(torch.uint8).copy_(payload)
        return place

    def _on_push_by_reference(self, connection: Connection, header: Header) -> None:
        aggregator = self._aggregator
        assert aggregator is not None
        reason = self._reason_against(aggregator, connection, header)
        if reason is not None:
            self._refuse(connection, header, reason, f"push refused: {reason.name}")
            return
        if not self._config.shares_memory:
            raise Refused(f"PUSH by reference: in mode {self._config.mode} no memory is shared")
        client = self._client_of(connection)
        for index in range(header.shard, header.shard + header.count):
            shard = self._layout.shards[index]
            if self._compresses(aggregator.owned_shards[index]):
                raise Refused(f"PUSH of shard {index} by reference: this job compresses its gradients")
            if shard.role is not TensorRole.TRAINED:
                raise Refused(f"PUSH of shard {index} by reference: only gradients are pushed so")
            if self._is_new(aggregator, header, index):
                self._divert_former(index, header.rank, connection)
                aggregator.accept(header, index, client.gradient(header.memory, shard, self._wire))

    def _client_of(self, connection: Connection) -> Client:
        client = self._shared_parameters.clients.get(connection)
        if client is None:
            raise Refused("only a worker that said HELLO may do that")
        return client

    def _on_request(self, connection: Connection, header: Header) -> None:
        aggregator = self._aggregator
        assert aggregator is not None
        if header.term < aggregator.plan.term:
            self._refuse(connection, header, Reason.STALE, "the term is over")
        elif header.kind is Kind.CLOCKS:
            aggregator.send_clocks(connection)
        elif header.kind is Kind.CUT and header.rank >= self._config.ranks:
            raise Refused(f"CUT of rank {header.rank}, and there are {self._config.ranks}")
        elif header.kind is Kind.CUT and aggregator.plan.ranks[header.rank] != connection.member:
            self._refuse(connection, header, Reason.NOT_HOLDER, f"rank {header.rank} is held by another worker")
        elif header.kind is Kind.CUT:
            aggregator.cut_rank(header.barrier, header.rank, header.step)
        elif header.kind is Kind.FINISH:
            self._pending.finish(connection, header)
        elif header.kind is Kind.AWAIT and header.rank >= self._config.ranks:
            raise Refused(f"AWAIT of rank {header.rank}, and there are {self._config.ranks}")
        elif header.kind is Kind.AWAIT:
            client = self._client_of(connection)
            if client.reading is not None and client.reading < header.step:
                client.reading = None
            self._pending.wait(client, header)
        elif header.shard not in aggregator.owned_shards:
            self._refuse(connection, header, Reason.NOT_OWNER, f"shard {header.shard} is owned elsewhere")
        else:
            self._pending.pull(connection, header)

    def _inspect(self) -> dict[str, object]:
        aggregator = self._aggregator
        return {
            "server": self._member,
            "term": aggregator.plan.term if aggregator else 0,
            "stage": self.stage,
            "version": aggregator.version if aggregator else None,
            "committed": aggregator.committed if aggregator else None,
            "shards": len(aggregator.owned_shards) if aggregator else 0,
        }
