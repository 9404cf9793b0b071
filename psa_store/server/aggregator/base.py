"""What a server asks of a job's mode: what becomes of gradients in the shards of one term, from the first push to the
last.

An aggregator lives as long as a term is served, in the event loop's thread, which tells it of everything that happens
and calls :meth:`Aggregator.advance` at the end of every turn. What is to be done is decided by a machine of
:mod:`psa_store.consistency`; an aggregator carries it out. ``sync`` and ``async_`` are the two.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from psa_store.cluster import Cut, Plan
from psa_store.consistency import Arrivals, Offer, Stage, SyncStep
from psa_store.consistency.instructions import (
    Applied,
    Commit,
    Copied,
    Copy,
    CopyDelayed,
    Event,
    Frozen,
    Hurry,
    Instruction,
    Missed,
    Moved,
    NormsTold,
    Pinned,
    RankCut,
    Revised,
    Stopped,
)
from psa_store.consistency.instructions import Committed as VersionCommitted
from psa_store.errors import Refused
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.observe.metrics import Metrics
from psa_store.optim.kernels import make_scratch
from psa_store.optim.note import PLAIN, GradientNote
from psa_store.server.arithmetic import Arithmetic, ShardWork
from psa_store.server.clients import SharedParameters
from psa_store.server.committer import Committer
from psa_store.server.connections import Connections
from psa_store.server.messages import Committed, Done, ToEventLoop, ToPlanFollower, Updated
from psa_store.server.relay import CellRelay
from psa_store.server.shard import OwnedShard
from psa_store.server.waiters import Now, Waiters
from psa_store.server.work import Work
from psa_store.testing.journal import Journal
from psa_store.wire import Connection, Header

INLINE_BYTES = 4 << 20
"""Parameters of a job's server that are updated in about a millisecond: waking other threads takes longer than that."""
_ROUNDS_MAX = 16
"""Rounds of instructions in one turn of the event loop, so that frames and messages are not kept waiting."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What belongs to the server and outlives its terms."""

    config: JobConfig
    layout: Layout
    arithmetic: Arithmetic
    committer: Committer
    shared_parameters: SharedParameters
    waiters: Waiters
    relay: CellRelay
    connections: Connections
    peers: Mapping[str, Connection]
    """The other servers of the plan, by name."""
    journal: Journal
    metrics: Metrics
    report: Callable[[ToPlanFollower], None]
    post: Callable[[ToEventLoop], None]


class Aggregator(ABC):
    """The shards of one term. Everything is called by the event loop's thread."""

    def __init__(
        self, tools: Tools, plan: Plan, owned_shards: Mapping[int, OwnedShard], machine: SyncStep | Arrivals
    ) -> None:
        self.plan = plan
        self.owned_shards = owned_shards
        self.versioned = {i: owned for i, owned in owned_shards.items() if owned.shard.role is not TensorRole.FROZEN}
        self.trained = [owned for owned in owned_shards.values() if owned.shard.role is TensorRole.TRAINED]
        self._tools = tools
        self._machine = machine
        self._may_copy = True
        self._reserved = False
        """Whether the memory of snapshots is held here, from the first copy to the commit."""
        self._inline = 0 < sum(owned.shard.size_bytes for owned in self.versioned.values()) < INLINE_BYTES
        self._scratch = make_scratch()
        self._metrics = tools.metrics.values
        self._commit_interval = tools.config.commit_interval
        self._recording = tools.journal.enabled
        """Asked once: a step passes many places that do something for tests only."""
        for owned in self.versioned.values():
            owned.take_snapshot()  # if Redis is wiped before the first commit of this server, no other process has it
        tools.committer.adopt(self._work(plan.resume))
        self._metrics["version"] = self._metrics["committed_version"] = plan.resume
        machine.handle(Revised(plan))

    # --- what the event loop tells

    def offers(self, header: Header, shards: Iterable[int]) -> list[Offer]:
        """Judge a push before its bytes are read, for each of these shards."""
        offer, step, rank = self._machine.offer, header.step, header.rank
        return [offer(step, shard, rank) for shard in shards]

    @abstractmethod
    def accept(
        self,
        header: Header,
        shard: int,
        gradient: Tensor | None,
        state: Tensor | None = None,
        note: GradientNote = PLAIN,
        *,
        finite: bool,
    ) -> None:
        """A push is here, whole; whether it is still wanted is seen now.

        ``gradient``: None if this step only brings the ``state`` of the rank (see :mod:`psa_store.optim.rank_state`).
        """

    def on_message(self, message: Done | Updated | Committed) -> None:
        """Another thread has done something for this term."""
        match message:
            case Done():
                self.handle(message.event)
            case Updated():
                self._tools.waiters.stream(self.plan, self.owned_shards[message.shard], message.version)
            case Committed():
                self.on_committed(message)

    @abstractmethod
    def handle(self, event: Event) -> None:
        """Something has happened to the shards."""

    def advance(self) -> bool:
        """Do what can be done now, in the order in which the machine says it; True if there may be more to do."""
        self._may_copy = True
        for _ in range(_ROUNDS_MAX):
            if self._tools.waiters.stale and self._machine.stage is Stage.COLLECTING:
                self._tools.waiters.answer(self._now())
            instructions = self._ready()
            if not instructions:
                return False
            for instruction in instructions:
                self._execute(instruction)
        return True

    def may_answer(self, await_header: Header) -> bool:
        """Whether an AWAIT can perhaps be answered before anything else happens to the shards."""
        return True

    @abstractmethod
    def _now(self) -> Now:
        """What there is to answer workers with."""

    @abstractmethod
    def _ready(self) -> list[Instruction]:
        """What the machine says is to be done."""

    def revise(self, plan: Plan) -> None:
        """The same term, but other ranks or another phase."""
        self.plan = plan
        self._machine.handle(Revised(plan))

    def on_committed(self, message: Committed) -> None:
        """A version of all shards here is durable."""
        self._machine.handle(VersionCommitted(message.version))
        self._tools.waiters.stale = True
        self._metrics["committed_version"] = message.version
        self._metrics["committed_time_seconds"] = time.time()
        self._metrics["commits"] += 1
        if self._recording:
            nonces = {shard: manifest.nonce for shard, manifest in message.manifests.items()}
            self._tools.journal.record("committed", term=message.term, version=message.version, nonces=nonces)
        if message.pinned is not None:
            self._tools.report(Pinned(message.term, message.pinned, message.version))

    def on_rank_cut(self, cut: RankCut) -> None:
        """A worker says with which push of a rank a checkpoint ends."""
        raise Refused("CUT in a synchronous job")

    def on_norms(self, told: NormsTold) -> None:
        """Another server tells the norms of its shards."""
        raise Refused("NORM in a job whose pushes are applied on arrival")

    @abstractmethod
    def send_state(self, peer: Connection) -> None:
        """Tell another server, to which there is a new connection, what it has missed."""

    @abstractmethod
    def send_clocks(self, connection: Connection) -> None:
        """Tell a worker that asks where its ranks stand."""

    def end(self) -> None:
        """The term is over, and no thread of arithmetic is at work any more."""
        if self._reserved:
            self._tools.committer.cancel()

    # --- what the event loop asks

    def exchanges(self, shard: int, step: int) -> bool:
        """Whether pushes for this step bring the gradient of this trained shard."""
        return self._tools.config.mode.exchanges(shard, step)

    @property
    def version(self) -> int:
        """The version that all shards here have reached."""
        return self._machine.version

    @property
    def untouched(self) -> int:
        """The first step of which the shards here have nothing that a rank pushed."""
        return self._machine.untouched * self._tools.config.steps_per_version

    @property
    def committed(self) -> int:
        """The newest version that this server has made durable."""
        return self._machine.committed

    @property
    def stage(self) -> str:
        """What is going on, for people."""
        return self._machine.stage.name.lower()

    @property
    @abstractmethod
    def missing(self) -> str:
        """What the next version waits for, for people; empty if it is the own work. Asked only when that lasts."""

    @property
    def stands_at(self) -> int | None:
        """The version at which all shards here stand still and whole; None if there is none."""
        return self._machine.stands_at

    # --- instructions that both machines give

    def _execute(self, instruction: Instruction) -> None:
        match instruction:
            case Copy():
                self._copy(instruction)
            case Commit():
                self._reserved = False
                self._tools.committer.submit(self._work(instruction.version, instruction.pin))
            case Hurry():
                self._tools.committer.hurry()
            case Frozen() | Stopped() | Pinned() | Missed():
                self._tools.report(instruction)
            case _:
                raise AssertionError(f"{instruction} in this mode")

    def _copy(self, copy: Copy) -> None:
        """Copy, unless a commit still reads the memory of snapshots: if storage is slower, training waits."""
        self._reserved = self._may_copy = self._reserved or self._tools.committer.reserve()
        if self._reserved:
            owned_shards = [self.owned_shards[shard] for shard in copy.shards]
            self._on_all(owned_shards, lambda owned, _: owned.take_snapshot(), Copied())
        else:
            self._machine.handle(CopyDelayed())

    def _on_all(
        self,
        owned_shards: Sequence[OwnedShard],
        work: ShardWork,
        done: Applied | Moved | Copied,
        each: Callable[[OwnedShard], None] | None = None,
    ) -> None:
        """Do this to the shards, by the threads of arithmetic or, where there is little to do, at once."""
        if self._inline:
            for owned in owned_shards:
                work(owned, self._scratch)
                if each is not None:
                    each(owned)
            self.handle(done)
        else:
            self._tools.arithmetic.on_all(self.plan.term, owned_shards, work, Done(self.plan.term, done), each=each)

    def _work(self, version: int, pin: Cut | None = None) -> Work:
        """The snapshots are this version."""
        regular = self._commit_interval > 0 and version % self._commit_interval == 0
        frozen = {i: owned for i, owned in self.owned_shards.items() if i not in self.versioned}
        return Work(self.plan.term, version, self.versioned, frozen, pin, extra=pin is not None and not regular)
