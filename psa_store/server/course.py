"""What the engine asks of a job's mode: the course that the shards of one epoch take, from the first push to the last.

A course lives as long as an epoch is served, in the engine's thread, which tells it of everything that happens and
calls :meth:`Course.advance` at the end of every turn. ``sync_course`` and ``arrival_course`` are the two.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from psa_store.consistency import Offer
from psa_store.errors import Refused
from psa_store.job import JobConfig
from psa_store.journal import Journal
from psa_store.layout import Layout, Role
from psa_store.optim import Optimizer
from psa_store.plan import Cut, Phase, Plan
from psa_store.server.arithmetic import INLINE_BYTES, Arithmetic
from psa_store.server.committer import Committer, Work
from psa_store.server.lead import Lead
from psa_store.server.letters import (
    Applied,
    Committed,
    Frozen,
    Measured,
    Missed,
    Moved,
    Pinned,
    Snapped,
    Stopped,
    ToControl,
    ToEngine,
    Updated,
)
from psa_store.server.pending import Pending
from psa_store.server.publication import Publication
from psa_store.server.reception import Reception
from psa_store.telemetry import Vitals
from psa_store.wire import Connection, Header

Done = Measured | Updated | Applied | Moved | Snapped
"""What the threads of arithmetic tell of."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What belongs to the server and outlives its epochs."""

    config: JobConfig
    layout: Layout
    optimizer: Optimizer
    arithmetic: Arithmetic
    committer: Committer
    publication: Publication
    pending: Pending
    reception: Reception
    peers: Mapping[str, Connection]
    """The other servers of the plan, by name."""
    journal: Journal
    vitals: Vitals
    report: Callable[[ToControl], None]
    post: Callable[[ToEngine], None]


class Course(ABC):
    """The shards of one epoch. Everything is called by the engine's thread."""

    def __init__(self, tools: Tools, plan: Plan, leads: Mapping[int, Lead]) -> None:
        self.plan = plan
        self.leads = leads
        self.committed = plan.resume
        """The newest version that this server has made durable."""
        self.versioned = {i: lead for i, lead in leads.items() if lead.shard.role is not Role.FROZEN}
        self.trained = [lead for lead in leads.values() if lead.shard.role is Role.TRAINED]
        self._tools = tools
        self._inline = sum(lead.shard.size_bytes for lead in leads.values()) < INLINE_BYTES
        self._reported: ToControl | None = None
        self._cut: Cut | None = None
        """The checkpoint that this epoch is asked for and that is not committed here yet."""
        for lead in self.versioned.values():
            lead.take_snapshot()  # if Redis is wiped before our first commit, nobody else has it
        tools.committer.adopt(self._work(plan.resume))
        tools.vitals.set("version", plan.resume)
        tools.vitals.set("committed_version", plan.resume)

    # --- what the engine tells

    @abstractmethod
    def offer(self, header: Header, shard: int) -> Offer:
        """Judge a push before its bytes are read."""

    @abstractmethod
    def accept(self, header: Header, shard: int, gradient: Tensor | None, state: Tensor | None = None) -> None:
        """A push is here, whole, and was offered as NEW.

        ``gradient``: None if this step only brings the ``state`` of the rank (see :mod:`psa_store.rank_state`).
        """

    @abstractmethod
    def obey(self, letter: Done) -> None:
        """The threads of arithmetic have done something."""

    @abstractmethod
    def advance(self) -> None:
        """Do what can be done now."""

    def revise(self, plan: Plan) -> None:
        """The same epoch, but other ranks or another phase."""
        if plan.cut != self.plan.cut:
            self._cut = plan.cut
        self.plan = plan
        self._reported = None
        if self._cut is not None and not self.versioned:
            self._tools.report(Pinned(plan.epoch, self._cut, self._cut.version))  # nothing here changes
            self._cut = None

    def on_committed(self, letter: Committed) -> None:
        """A version of all shards here is durable."""
        self.committed = letter.version
        self._tools.vitals.set("committed_version", letter.version)
        self._tools.vitals.set("committed_time_seconds", time.time())
        self._tools.vitals.add("commits")
        self._tools.journal.record("committed", epoch=letter.epoch, version=letter.version)
        if letter.pinned is not None:
            self._tools.report(Pinned(letter.epoch, letter.pinned, letter.version))

    def mark(self, barrier: int, rank: int, clock: int) -> None:
        """A worker says with which push of a rank a checkpoint ends."""
        raise Refused("MARK in a synchronous job")

    def hear(self, step: int, norms: Mapping[int, float]) -> None:
        """Another server tells the norms of its shards."""
        raise Refused("NORM in a job whose pushes are applied on arrival")

    @abstractmethod
    def greet(self, peer: Connection) -> None:
        """Tell another server, to which there is a new connection, what it has missed."""

    def greet_worker(self, connection: Connection) -> None:
        """Tell a worker that asks where its ranks stand."""
        raise Refused("CLOCKS in a synchronous job")

    @abstractmethod
    def end(self) -> None:
        """The epoch is over, and no thread of arithmetic is at work any more."""

    # --- what the engine asks

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
        frozen = {i: lead for i, lead in self.leads.items() if i not in self.versioned}
        extra = pin is not None and not self._is_regular(version)
        return Work(self.plan.epoch, version, self.versioned, frozen, pin, extra)

    def _is_regular(self, version: int) -> bool:
        """Whether every server commits this version in any case."""
        interval = self._tools.config.commit_interval
        return interval > 0 and version % interval == 0

    def _miss(self) -> None:
        """The checkpoint cannot be taken here any more."""
        assert self._cut is not None
        self._tools.report(Missed(self.plan.epoch, self._cut))
        self._cut = None

    def _held(self, version: int, newest: int) -> bool:
        """Whether the plan's phase forbids to go on; tells control once we stand where it wants us.

        Args:
            version: what all shards here have reached; ``newest``: what some have.
        """
        if self.plan.phase is Phase.FREEZE:
            self._report_once(Frozen(self.plan.mark, version, newest))
            return True
        if self.plan.phase is Phase.STOP and version >= self.plan.mark:
            if self.committed == version:
                self._report_once(Stopped(version))
            return True
        return False

    def _report_once(self, report: ToControl) -> None:
        if report != self._reported:
            self._reported = report
            self._tools.report(report)
