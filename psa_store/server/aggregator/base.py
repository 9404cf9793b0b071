"""What the event loop asks of a job's mode: the course that the shards of one term take, from the first push to the
last.

A course lives as long as a term is served, in the event loop's thread, which tells it of everything that happens and
calls :meth:`Aggregator.advance` at the end of every turn. ``sync_course`` and ``arrival_course`` are the two.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from psa_store.cluster import Cut, Phase, Plan
from psa_store.consistency import Offer
from psa_store.errors import Refused
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.observe.metrics import Metrics
from psa_store.optim import Optimizer
from psa_store.server.arithmetic import INLINE_BYTES, Arithmetic
from psa_store.server.committer import Committer, Work
from psa_store.server.connections import Connections
from psa_store.server.messages import (
    Applied,
    Committed,
    Frozen,
    Measured,
    Missed,
    Moved,
    Pinned,
    Snapped,
    Stopped,
    ToEventLoop,
    ToPlanFollower,
    Updated,
)
from psa_store.server.shard import OwnedShard
from psa_store.server.shared_parameters import SharedParameters
from psa_store.server.waiters import Waiters
from psa_store.testing.journal import Journal
from psa_store.wire import Connection, Header

Done = Measured | Updated | Applied | Moved | Snapped
"""What the threads of arithmetic tell of."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What belongs to the server and outlives its terms."""

    config: JobConfig
    layout: Layout
    optimizer: Optimizer
    arithmetic: Arithmetic
    committer: Committer
    shared_parameters: SharedParameters
    pending: Waiters
    connections: Connections
    peers: Mapping[str, Connection]
    """The other servers of the plan, by name."""
    journal: Journal
    metrics: Metrics
    report: Callable[[ToPlanFollower], None]
    post: Callable[[ToEventLoop], None]


class Aggregator(ABC):
    """The shards of one term. Everything is called by the event loop's thread."""

    def __init__(self, tools: Tools, plan: Plan, owned_shards: Mapping[int, OwnedShard]) -> None:
        self.plan = plan
        self.owned_shards = owned_shards
        self.committed = plan.resume
        """The newest version that this server has made durable."""
        self.versioned = {i: owned for i, owned in owned_shards.items() if owned.shard.role is not TensorRole.FROZEN}
        self.trained = [owned for owned in owned_shards.values() if owned.shard.role is TensorRole.TRAINED]
        self._tools = tools
        self._inline = sum(owned.shard.size_bytes for owned in owned_shards.values()) < INLINE_BYTES
        self._reported: ToPlanFollower | None = None
        self._cut: Cut | None = None
        """The checkpoint that this term is asked for and that is not committed here yet."""
        for owned in self.versioned.values():
            owned.take_snapshot()  # if Redis is wiped before our first commit, nobody else has it
        tools.committer.adopt(self._work(plan.resume))
        tools.metrics.set("version", plan.resume)
        tools.metrics.set("committed_version", plan.resume)

    # --- what the event loop tells

    @abstractmethod
    def offer(self, header: Header, shard: int) -> Offer:
        """Judge a push before its bytes are read."""

    @abstractmethod
    def accept(self, header: Header, shard: int, gradient: Tensor | None, state: Tensor | None = None) -> None:
        """A push is here, whole, and was offered as NEW.

        ``gradient``: None if this step only brings the ``state`` of the rank (see :mod:`psa_store.optim.rank_state`).
        """

    @abstractmethod
    def handle(self, message: Done) -> None:
        """The threads of arithmetic have done something."""

    @abstractmethod
    def advance(self) -> None:
        """Do what can be done now."""

    def revise(self, plan: Plan) -> None:
        """The same term, but other ranks or another phase."""
        if plan.cut != self.plan.cut:
            self._cut = plan.cut
        self.plan = plan
        self._reported = None
        if self._cut is not None and not self.versioned:
            self._tools.report(
                Pinned(plan.term, self._cut, plan.resume if self._cut.version is None else self._cut.version)
            )  # nothing here changes
            self._cut = None

    def on_committed(self, message: Committed) -> None:
        """A version of all shards here is durable."""
        self.committed = message.version
        self._tools.metrics.set("committed_version", message.version)
        self._tools.metrics.set("committed_time_seconds", time.time())
        self._tools.metrics.add("commits")
        self._tools.journal.record("committed", term=message.term, version=message.version)
        if message.pinned is not None:
            self._tools.report(Pinned(message.term, message.pinned, message.version))

    def cut_rank(self, barrier: int, rank: int, clock: int) -> None:
        """A worker says with which push of a rank a checkpoint ends."""
        raise Refused("CUT in a synchronous job")

    def on_norms(self, step: int, norms: Mapping[int, float]) -> None:
        """Another server tells the norms of its shards."""
        raise Refused("NORM in a job whose pushes are applied on arrival")

    @abstractmethod
    def send_state(self, peer: Connection) -> None:
        """Tell another server, to which there is a new connection, what it has missed."""

    def send_clocks(self, connection: Connection) -> None:
        """Tell a worker that asks where its ranks stand."""
        raise Refused("CLOCKS in a synchronous job")

    @abstractmethod
    def end(self) -> None:
        """The term is over, and no thread of arithmetic is at work any more."""

    # --- what the event loop asks

    @property
    @abstractmethod
    def version(self) -> int:
        """The version that all shards here have reached."""

    @property
    @abstractmethod
    def stage(self) -> str:
        """What is going on, for people."""

    @property
    @abstractmethod
    def stands_at(self) -> int | None:
        """The version at which all shards here stand still and whole; None if there is none."""

    # --- for the courses

    def _work(self, version: int, pin: Cut | None = None) -> Work:
        """The snapshots are this version."""
        frozen = {i: owned for i, owned in self.owned_shards.items() if i not in self.versioned}
        extra = pin is not None and not self._is_regular(version)
        return Work(self.plan.term, version, self.versioned, frozen, pin, extra)

    def _is_regular(self, version: int) -> bool:
        """Whether every server commits this version in any case."""
        interval = self._tools.config.commit_interval
        return interval > 0 and version % interval == 0

    def _miss(self) -> None:
        """The checkpoint cannot be taken here any more."""
        assert self._cut is not None
        self._tools.report(Missed(self.plan.term, self._cut))
        self._cut = None

    def _held(self, version: int, newest: int) -> bool:
        """Whether the plan's phase forbids to go on; tells control once we stand where it wants us.

        Args:
            version: what all shards here have reached; ``newest``: what some have.
        """
        if self.plan.phase is Phase.FREEZE:
            assert self.plan.freeze_revision is not None
            self._report_once(Frozen(self.plan.freeze_revision, version, newest))
            return True
        if self.plan.stop_version is not None and version >= self.plan.stop_version:
            if self.committed == version:
                self._report_once(Stopped(version))
            return True
        return False

    def _report_once(self, report: ToPlanFollower) -> None:
        if report != self._reported:
            self._reported = report
            self._tools.report(report)
