"""The event loop of a server: takes gradients in, hands new versions out.

One thread owns the step's state machine and, through reception, all connections; the threads of arithmetic reduce and
update; the committer writes to Redis; control (another thread) tells which shards to lead. They talk through mailboxes
only, so nothing in here needs a lock. The life of a step can be read in :meth:`Engine._advance`.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto

import numpy as np
from torch import Tensor

from psa_store import telemetry
from psa_store.consistency import Offer, SyncStep, Verdict
from psa_store.errors import Refused
from psa_store.failpoints import failpoint
from psa_store.job import JobConfig
from psa_store.journal import Journal, fingerprint_text
from psa_store.layout import Layout, Role
from psa_store.optim import Optimizer
from psa_store.optim.reduce import clip_factor
from psa_store.plan import Phase, Plan
from psa_store.server.arithmetic import INLINE_BYTES, Arithmetic, ShardWork
from psa_store.server.client import Client
from psa_store.server.committer import Committer, Work
from psa_store.server.lead import Lead, as_bytes
from psa_store.server.letters import (
    Applied,
    CannotServe,
    Committed,
    Frozen,
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
    Stopped,
    ToControl,
    ToEngine,
    Updated,
)
from psa_store.server.pending import Now, Pending
from psa_store.server.reception import Reception
from psa_store.transport import WireLayout
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
    decode_text,
    encode_text,
)

_TICK_S = 0.2
_NOTHING = memoryview(b"")
_NUMBER_BYTES = 8
_MEMBER = re.compile(r"[!-~]+")
_LAPSED_PAUSE_S = 0.02


class Stage(Enum):
    IDLE = auto()
    """No epoch to serve: everything that belongs to one is parked."""
    COLLECTING = auto()
    MOVING = auto()
    """Parameters are being copied to other memory, because somebody may still read the present version in the old."""
    APPLYING = auto()
    SNAPPING = auto()


class Engine:
    """Owns the thread ``psa-engine``. Everybody else talks to it through :meth:`post`."""

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
        report: Callable[[ToControl], None],
        journal: Journal,
    ) -> None:
        self._member = member
        self._config = config
        self._layout = layout
        self._wire = WireLayout(layout, config.transport)
        self._optimizer = optimizer
        self._lease_left_s = lease_left_s
        self._report = report
        self._journal = journal
        self._log = telemetry.get_logger()
        self._mailbox: Mailbox[ToEngine] = Mailbox()
        self._committer = make_committer(self._mailbox.post)
        self._arithmetic = Arithmetic(threads, self._mailbox.post)
        self._reception = Reception(self, listeners, self._mailbox)
        self._clients: dict[Connection, Client] = {}
        self._peers: dict[str, Connection] = {}
        self._scratch = memoryview(bytearray(max(shard.size_bytes for shard in layout.shards)))

        self._stage = Stage.IDLE
        self._plan: Plan | None = None
        self._leads: dict[int, Lead] = {}
        self._memory = SharedMemory.create(member, 0)
        self._generation = 0
        self._step = self._new_step(0, {})
        self._committed = -1
        self._committing = -1
        self._told = -1
        self._reported: ToControl | None = None
        self._pending = Pending(self._reception, self._wire, journal)
        self._to_measure: list[Lead] = []
        self._inline = True
        self._receiving: dict[tuple[int, int], Connection] = {}
        self._dropping: dict[Connection, Reason] = {}
        self._lapsed = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="psa-engine")

    # --- for the other threads

    def start(self) -> None:
        self._thread.start()

    def post(self, letter: ToEngine) -> None:
        self._mailbox.post(letter)

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

    # --- the loop

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.failure = error  # a bug: control raises it, so that the process ends and is seen to have failed
        finally:
            self._drop_epoch()
            self._reception.close_all()

    def _turn(self) -> bool:
        """One turn of the loop; False at the end."""
        events = self._reception.wait(_TICK_S)
        lapsed = self._lease_left_s() <= 0
        if lapsed is not self._lapsed:
            # ZooKeeper may have declared us dead meanwhile: neither read nor answer until it is heard again.
            self._lapsed = lapsed
            self._log.warning("ZooKeeper is silent: not serving" if lapsed else "ZooKeeper is heard: serving")
        if lapsed:
            time.sleep(_LAPSED_PAUSE_S)
            events = []
        self._reception.serve(events)
        for letter in self._mailbox.drain():
            if isinstance(letter, Quit):
                return False
            self._obey(letter)
        if not lapsed:
            self._advance()
        return True

    def _obey(self, letter: ToEngine) -> None:
        match letter:
            case Release():
                self._release(letter.epoch)
            case Serve():
                self._serve(letter)
            case Revise():
                self._revise(letter.plan)
            case Join():
                self._add_peer(letter.server, letter.sock)
            case _ if self._plan is None or letter.epoch != self._plan.epoch:  # type: ignore[union-attr]
                pass  # an answer from the pool or the committer that comes after its epoch
            case Measured():
                for shard, squared_norm in letter.squared_norms.items():
                    self._step.measured(shard, squared_norm)
            case Updated():
                self._pending.stream(self._plan, self._leads[letter.shard], letter.version)
            case Moved():
                self._stage = Stage.COLLECTING
            case Applied():
                failpoint("step.applied")
                self._step.advance()
                self._stage = Stage.COLLECTING
            case Snapped():
                versioned = self._versioned_leads()
                frozen = {i: lead for i, lead in self._leads.items() if i not in versioned}
                self._committer.submit(Work(letter.epoch, letter.version, versioned, frozen))
                self._stage = Stage.COLLECTING
            case Committed():
                self._committed = letter.version
                self._journal.record("committed", epoch=letter.epoch, version=letter.version)
            case Lost():
                self._log.error("lost the shards of this epoch", epoch=letter.epoch, why=letter.why)
                self._report(CannotServe(letter.epoch, letter.why))
                self._drop_epoch()

    # --- epochs

    def _release(self, epoch: int) -> None:
        version, leads = self._step.version, self._leads
        if self._stage is Stage.IDLE or self._committed != version:
            leads = {}
        self._drop_epoch()
        self._committer.begin(epoch)
        self._report(Released(version, leads))

    def _drop_epoch(self) -> None:
        """Back to IDLE; afterwards no thread touches the memory of the old epoch but an unfinished commit."""
        self._arithmetic.settle()
        if self._stage is Stage.SNAPPING:
            self._committer.cancel()
        for (shard, rank), connection in self._receiving.items():
            self._log.debug("diverting a push of the old epoch", shard=shard, rank=rank)
            connection.divert(self._scratch)
            self._dropping[connection] = Reason.STALE
        self._reception.detach_all()
        for peer in list(self._peers.values()):
            self._reception.close(peer)
        self._receiving.clear()
        self._pending.clear()
        self._to_measure.clear()
        self._stage = Stage.IDLE
        self._plan = None
        self._leads = {}

    def _serve(self, letter: Serve) -> None:
        plan = letter.plan
        self._member = letter.member
        self._plan = plan
        self._leads = dict(letter.leads)
        self._inline = sum(lead.shard.size_bytes for lead in self._leads.values()) < INLINE_BYTES
        self._publish_in(letter.memory)
        self._step = self._new_step(plan.resume, self._leads)
        self._committed = self._committing = plan.resume
        self._told = -1
        self._reported = None
        self._stage = Stage.COLLECTING
        for server, sock in letter.peers.items():
            self._add_peer(server, sock)
        self._journal.record(
            "serving",
            epoch=plan.epoch,
            resume=plan.resume,
            member=self._member,
            shards=list(self._leads),
            trained=[lead.shard.index for lead in self._trained_leads()],
        )
        self._log.info("serving", epoch=plan.epoch, version=plan.resume, shards=len(self._leads))
        self._reception.wake_parked()

    def _revise(self, plan: Plan) -> None:
        if self._plan is None or plan.epoch != self._plan.epoch:
            return
        self._plan = plan
        self._reported = None
        for (shard, rank), connection in list(self._receiving.items()):
            if plan.ranks[rank] != connection.member:
                connection.divert(self._scratch)
                self._dropping[connection] = Reason.NOT_HOLDER
                del self._receiving[shard, rank]
        self._reception.wake_parked()

    def _publish_in(self, memory: SharedMemory) -> None:
        """Nobody has this memory yet, and what was shown before will not change any more."""
        self._memory = memory
        self._generation += 1
        for client in self._clients.values():
            client.reading = None

    def _new_step(self, version: int, leads: Mapping[int, Lead]) -> SyncStep:
        return SyncStep(
            version=version,
            ranks=self._config.ranks,
            trained=[i for i, lead in leads.items() if lead.shard.role is Role.TRAINED],
            buffers=[i for i, lead in leads.items() if lead.shard.role is Role.BUFFER],
            all_shards=[shard.index for shard in self._layout.versioned],
            needs_norms=self._optimizer.clip_grad_norm is not None,
        )

    def _trained_leads(self) -> list[Lead]:
        return [lead for lead in self._leads.values() if lead.shard.role is Role.TRAINED]

    def _versioned_leads(self) -> dict[int, Lead]:
        return {i: lead for i, lead in self._leads.items() if lead.shard.role is not Role.FROZEN}

    # --- the life of a step

    def _advance(self) -> None:
        """Do what can be done now: answer, commit, tell norms, and go on to the next version."""
        plan = self._plan
        if self._stage is not Stage.COLLECTING or plan is None:
            return
        self._pending.answer(
            Now(plan, self._step.version, self._committed, self._leads, self._memory, self._generation)
        )
        if self._to_measure:
            leads, self._to_measure = self._to_measure, []
            self._arithmetic.measure(plan.epoch, leads, self._config.ranks, inline=self._inline)
        if self._commit_is_due(plan):
            # The state of this version must be copied before it may change: if storage is slower than training,
            # training waits here.
            if self._committer.reserve():
                self._committing = self._step.version
                self._stage = Stage.SNAPPING
                self._on_leads(plan, lambda lead, _: lead.take_snapshot(), Snapped(plan.epoch, self._step.version))
            return
        self._tell_norms(plan)
        if self._held(plan):
            return
        match self._step.verdict():
            case Verdict.APPLY:
                self._apply(plan)
            case Verdict.SKIP:
                self._log.warning("skipping a step with NaN or Inf gradients", step=self._step.version)
                self._journal.record("skipped", epoch=plan.epoch, version=self._step.version + 1)
                self._step.advance()
                self._advance()
            case Verdict.WAIT:
                pass

    def _commit_is_due(self, plan: Plan) -> bool:
        version = self._step.version
        if version in (self._committing, self._committed):
            return False
        every = self._config.commit_every
        return (
            (every > 0 and version % every == 0)
            or (plan.phase is Phase.STOP and version == plan.mark)
            or self._pending.finish_is_due(version)
        )

    def _held(self, plan: Plan) -> bool:
        """Whether the plan's phase forbids to go on; tells control once we stand where it wants us."""
        version = self._step.version
        if plan.phase is Phase.FREEZE:
            self._report_once(Frozen(plan.mark, version))
            return True
        if plan.phase is Phase.STOP and version >= plan.mark:
            if self._committed == version:
                self._report_once(Stopped(version))
            return True
        return False

    def _report_once(self, report: ToControl) -> None:
        if report != self._reported:
            self._reported = report
            self._report(report)

    def _tell_norms(self, plan: Plan) -> None:
        norms = self._step.own_norms()
        if norms is None or self._told == self._step.version:
            return
        self._told = self._step.version
        for connection in list(self._peers.values()):
            self._send_norms(plan, connection, norms)

    def _send_norms(self, plan: Plan, connection: Connection, norms: Mapping[int, float]) -> None:
        payload = np.array(list(norms.items()), dtype="<f8").tobytes()
        header = Header(Kind.NORM, plan.epoch, plan.revision, self._step.version, length=len(payload))
        self._reception.send(connection, header, payload)

    def _apply(self, plan: Plan) -> None:
        """Update all shards in place, once nobody reads the present version in our memory any more.

        A worker that holds a rank will be done with it soon, or lose the rank, or die. One that holds none (it was
        paused, or its ranks went to another) may read on for as long as it likes: we leave it the memory, and go on in
        a copy.
        """
        readers = [client for client in self._clients.values() if client.reading is not None]
        if any(client.member in plan.ranks for client in readers):
            return
        if readers:
            self._log.info("leaving memory to workers that still read it", workers=[each.member for each in readers])
            memory = SharedMemory.create(self._member, self._layout.arena_bytes)
            self._stage = Stage.MOVING
            self._publish_in(memory)
            leads = list(self._leads.values())
            self._arithmetic.on_all(
                plan.epoch, leads, lambda lead, _: lead.move_to(memory), Moved(plan.epoch), inline=self._inline
            )
            return
        step, ranks = self._step.version, self._config.ranks
        failpoint("step.complete")
        self._record_applied(plan.epoch, step + 1)
        scale = clip_factor(self._step.norms_in_order(), self._optimizer.clip_grad_norm)
        self._reception.detach_all()
        self._stage = Stage.APPLYING
        streaming = self._pending.begin_streaming(step + 1)
        self._on_leads(
            plan,
            lambda lead, scratch: lead.apply(ranks, scratch, step=step, grad_scale=scale),
            Applied(plan.epoch, step + 1),
            each=self._say_updated(plan.epoch, step + 1) if streaming else None,
        )

    def _record_applied(self, epoch: int, version: int) -> None:
        """Write down what goes into ``version``, before anybody can learn of it."""
        if not self._journal.enabled:
            return
        ranks = range(self._config.ranks)
        prints = [lead.fingerprints() for lead in self._trained_leads()]
        counts = {rank: sum(rank in each for each in prints) for rank in ranks}
        sums = {rank: fingerprint_text(sum(each.get(rank, 0) for each in prints)) for rank in ranks}
        self._journal.record("applied", epoch=epoch, version=version, ranks=counts, sums=sums)

    def _say_updated(self, epoch: int, version: int) -> Callable[[Lead], None]:
        return lambda lead: self._mailbox.post(Updated(epoch, lead.shard.index, version))

    def _on_leads(
        self, plan: Plan, work: ShardWork, done: ToEngine, each: Callable[[Lead], None] | None = None
    ) -> None:
        leads = list(self._versioned_leads().values())
        self._arithmetic.on_all(plan.epoch, leads, work, done, inline=self._inline, each=each)

    # --- connections

    def on_gone(self, connection: Connection) -> None:
        self._dropping.pop(connection, None)
        self._receiving = {k: v for k, v in self._receiving.items() if v is not connection}
        self._pending.forget(connection)
        self._clients.pop(connection, None)
        for server, peer in list(self._peers.items()):
            if peer is connection:
                del self._peers[server]
                if self._plan is not None:
                    self._report(PeerGone(self._plan.epoch, server))

    def on_stranger(self, connection: Connection, why: str) -> None:
        self._refuse(connection, Header(Kind.HELLO), Reason.WRONG, why)

    def _refuse(self, connection: Connection, header: Header, reason: Reason, text: str) -> None:
        payload = encode_text({"kind": header.kind.name, "why": text})
        answer = Header(
            Kind.REFUSED,
            self._plan.epoch if self._plan else 0,
            self._plan.revision if self._plan else 0,
            header.step,
            header.rank,
            header.shard,
            len(payload),
            reason,
        )
        self._reception.send(connection, answer, payload)

    def _add_peer(self, server: str, sock: socket.socket) -> None:
        if self._plan is None:
            sock.close()
            return
        connection = self._reception.add(sock, server)
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
        self._reception.send(connection, Header(Kind.HELLO, length=len(hello)), hello)
        norms = self._step.own_norms()
        if norms is not None and self._told == self._step.version:
            self._send_norms(self._plan, connection, norms)

    # --- frames

    def admit(self, connection: Connection, header: Header) -> memoryview | Park:
        """Judge a frame by its header: where its payload goes, or that it must wait for a newer plan."""
        match header.kind:
            case Kind.HELLO | Kind.WELCOME | Kind.INSPECT | Kind.REFUSED:
                return memoryview(bytearray(header.length))
            case Kind.SHARE | Kind.PUSH | Kind.PULL | Kind.AWAIT | Kind.NORM | Kind.FINISH if not connection.member:
                raise Refused(f"{header.kind.name} before HELLO")
            case Kind.SHARE:
                return _NOTHING
            case Kind.PUSH | Kind.PULL | Kind.AWAIT | Kind.NORM | Kind.FINISH:
                plan = self._plan
                if plan is None or (header.epoch, header.revision) > (plan.epoch, plan.revision):
                    return PARK
                if header.kind is Kind.PUSH:
                    return self._admit_push(plan, connection, header)
                return memoryview(bytearray(header.length))
        raise Refused(f"a server takes no {header.kind.name}")

    def _admit_push(self, plan: Plan, connection: Connection, header: Header) -> memoryview:
        """Judge a gradient: by value, its place, or scratch memory if it is not wanted; by reference, nothing comes."""
        if header.flags & Flag.BY_REFERENCE:
            if not 0 < header.count <= len(self._layout.shards) - header.shard:
                raise Refused(f"PUSH of {header.count} shards from shard {header.shard}: there are not so many")
            return _NOTHING
        header = replace(header, count=1)
        reason = self._reason_against(plan, connection, header)
        if reason is None:
            lead = self._leads[header.shard]
            size_bytes = self._wire.size_bytes(lead.shard)
            if header.length != size_bytes:
                raise Refused(f"PUSH of {header.length} bytes for shard {header.shard} of {size_bytes}")
            if self._is_new(header, header.shard):
                self._divert_former(header.shard, header.rank)
                self._receiving[header.shard, header.rank] = connection
                return as_bytes(lead.own_place(header.rank))
            reason = Reason.NONE
        if header.length > len(self._scratch):
            raise Refused(f"PUSH of {header.length} bytes; no shard is larger than {len(self._scratch)}")
        self._dropping[connection] = reason
        return self._scratch[: header.length]

    def _reason_against(self, plan: Plan, connection: Connection, header: Header) -> Reason | None:
        if header.flags & Flag.NONFINITE and not self._config.skip_nonfinite:
            raise Refused("PUSH of a gradient with NaN or Inf, which this job does not skip")
        if header.epoch < plan.epoch:
            return Reason.STALE
        if any(shard not in self._leads for shard in range(header.shard, header.shard + header.count)):
            return Reason.NOT_OWNER
        if header.rank >= self._config.ranks or plan.ranks[header.rank] != connection.member:
            return Reason.NOT_HOLDER
        return None

    def _is_new(self, header: Header, shard: int) -> bool:
        """Whether a gradient is wanted; False if we have it or its step is over."""
        offer = self._step.offer(header.step, shard, header.rank)
        if offer is Offer.AHEAD:
            raise Refused(f"PUSH for step {header.step} while version {self._step.version} is the newest")
        return offer is Offer.NEW

    def _divert_former(self, shard: int, rank: int) -> None:
        """The same gradient is being received from somebody else: what is still to come of it is not wanted."""
        former = self._receiving.pop((shard, rank), None)
        if former is not None:
            former.divert(self._scratch)
            self._dropping[former] = Reason.NONE

    def on_frame(self, connection: Connection, header: Header, payload: memoryview) -> None:
        match header.kind:
            case Kind.HELLO:
                self._on_hello(connection, decode_text(payload))
            case Kind.SHARE:
                self._client_of(connection).share(header.slot, self._wire, self._config.ranks)
            case Kind.PUSH if header.flags & Flag.BY_REFERENCE:
                self._on_push_by_reference(connection, header)
            case Kind.PUSH:
                self._on_push(connection, header)
            case Kind.PULL | Kind.AWAIT | Kind.FINISH:
                self._on_request(connection, header)
            case Kind.NORM:
                if self._plan is not None and header.epoch == self._plan.epoch:
                    self._on_norms(self._plan, connection, header, payload)
            case Kind.INSPECT:
                text = encode_text(self._inspect())
                self._reception.send(connection, Header(Kind.REPORT, length=len(text)), text)
            case Kind.REFUSED:
                raise Refused(f"a peer refused us: {decode_text(payload).get('why')}")
            case _:
                pass

    def _on_norms(self, plan: Plan, connection: Connection, header: Header, payload: memoryview) -> None:
        if header.length % (2 * _NUMBER_BYTES):
            raise Refused(f"NORM of {header.length} bytes: not pairs of numbers")
        pairs = np.frombuffer(payload, dtype="<f8").reshape(-1, 2)
        norms = {int(shard): float(norm) for shard, norm in pairs if np.isfinite(shard)}
        if not norms.keys() <= set(plan.shards_of(connection.member)):
            raise Refused(f"NORM of shards that {connection.member} does not lead")
        self._step.hear(header.step, norms)

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
        for other in [each.connection for each in self._clients.values() if each.member == member]:
            self._reception.close(other)  # its owner has left it: one member has one connection
        connection.member = connection.peer = member
        self._clients[connection] = Client(connection, member, connection.is_local and bool(hello.get("by_reference")))
        text = encode_text({"server": self._member})
        self._reception.send(connection, Header(Kind.WELCOME, length=len(text)), text)

    def _on_push(self, connection: Connection, header: Header) -> None:
        reason = self._dropping.pop(connection, None)
        if reason is not None:
            if reason is not Reason.NONE:
                self._refuse(connection, header, reason, f"push refused: {reason.name}")
            return
        assert self._receiving.pop((header.shard, header.rank)) is connection
        self._accept(header, header.shard, self._leads[header.shard].own_place(header.rank))

    def _on_push_by_reference(self, connection: Connection, header: Header) -> None:
        assert self._plan is not None
        reason = self._reason_against(self._plan, connection, header)
        if reason is not None:
            self._refuse(connection, header, reason, f"push refused: {reason.name}")
            return
        client = self._client_of(connection)
        for index in range(header.shard, header.shard + header.count):
            shard = self._layout.shards[index]
            if shard.role is not Role.TRAINED:
                raise Refused(f"PUSH of shard {index} by reference: only gradients are pushed so")
            if self._is_new(header, index):
                self._divert_former(index, header.rank)
                self._accept(header, index, client.gradient(header.slot, shard, self._wire))

    def _accept(self, header: Header, shard: int, gradient: Tensor) -> None:
        """A gradient is here, whole, and the first of its kind."""
        assert self._plan is not None
        lead = self._leads[shard]
        lead.take_gradient(header.rank, gradient)
        if self._step.accept(shard, header.rank, finite=not header.flags & Flag.NONFINITE):
            self._to_measure.append(lead)

    def _client_of(self, connection: Connection) -> Client:
        client = self._clients.get(connection)
        if client is None:
            raise Refused("only a worker that said HELLO may do that")
        return client

    def _on_request(self, connection: Connection, header: Header) -> None:
        assert self._plan is not None
        if header.epoch < self._plan.epoch:
            self._refuse(connection, header, Reason.STALE, "the epoch is over")
        elif header.kind is Kind.FINISH:
            self._pending.finish(connection, header)
        elif header.kind is Kind.AWAIT:
            client = self._client_of(connection)
            if client.reading is not None and client.reading < header.step:
                client.reading = None
            self._pending.wait(client, header)
        elif header.shard not in self._leads:
            self._refuse(connection, header, Reason.NOT_OWNER, f"shard {header.shard} is led elsewhere")
        else:
            self._pending.pull(connection, header)

    def _inspect(self) -> dict[str, object]:
        return {
            "server": self._member,
            "epoch": self._plan.epoch if self._plan else 0,
            "stage": self._stage.name.lower(),
            "version": self._step.version if self._plan else None,
            "committed": self._committed if self._plan else None,
            "shards": len(self._leads),
        }
