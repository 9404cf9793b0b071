"""How a worker follows the plan, the same in every mode: stand in its term with all servers, listen, and start over.

A strategy owns one :class:`PlanSession` and is its :class:`Follower`. In the strategy's loop::

    while not session.leaving:
        if not (session.stands or session.settle()):   # connect and load, if the term is new or a connection broke
            session.wait()
            continue
        ...                                            # do one thing, or session.wait() for an answer

Every disturbance (a new term, a lost connection, a refusal) only makes ``stands`` false. What was in flight is unknown
then, so the session drops all connections, and the next ``settle()`` compares what both sides have.

Used by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from psa_store import logs
from psa_store.cluster import Cell, Plan
from psa_store.errors import DependencyUnreachable, Disconnected, Refused
from psa_store.job.change import steps_set
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, Shard, TensorRole
from psa_store.job.wire_layout import WireLayout
from psa_store.logs.waits import SAY_AFTER_S
from psa_store.observe.formatting import count, names
from psa_store.optim.history import of_ranks
from psa_store.testing import failpoints
from psa_store.testing.journal import Journal
from psa_store.wire import Header, Kind
from psa_store.worker.health import SERVERS, Progress
from psa_store.worker.membership import Membership, Standing
from psa_store.worker.server_connections import Answer, ServerConnections, is_about_plan

_USUAL = 2.0
"""One may wait so many times what a step takes until it is said for what."""
WAIT_S = 0.5
"""How long one wait lasts at most before everything is looked at again; nothing depends on it but signals."""


class Memory(Protocol):
    """Where parameters come to; strategies know more of it."""

    def hide(self) -> None:
        """Own memory for everything again, with undefined contents: parameters are about to be received."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What belongs to the worker and its strategy uses."""

    config: JobConfig
    layout: Layout
    wire: WireLayout
    steps: int | None
    model: Memory
    servers: ServerConnections
    membership: Membership
    journal: Journal
    read_config: Callable[[], JobConfig]
    """What the job is now, with all its changes; raises DependencyUnreachable."""
    progress: Progress


class Follower(Protocol):
    """What differs between the modes."""

    def load(self, plan: Plan) -> bool:
        """Begin a term, or the present one again, on new connections; False if it is over before."""

    def replanned(self) -> None:
        """A newer plan of the same term: ranks may have come or gone."""

    def take(self, answer: Answer) -> None:
        """A server has answered: PARAMS, VERSION, STATE or CLOCKS."""

    def refused(self, header: Header) -> None:
        """A server has refused a frame, because one of the two has an old plan."""

    def lost(self) -> None:
        """The connections are gone, and what was asked for and not answered with them."""

    def place(self, header: Header, shard: Shard) -> memoryview:
        """Name the memory for a shard that comes by value."""

    @property
    def awaited(self) -> str:
        """What it waits for in its steps, for people; empty if for nothing. Asked only when that lasts."""


class PlanSession:
    """One worker's standing with the servers of the plan."""

    plan: Plan
    """The one that is followed; there is none before the first :meth:`settle`."""

    def __init__(self, tools: Tools, follower: Follower) -> None:
        self._servers = tools.servers
        self._servers.place = self._place
        self._membership = tools.membership
        self._model = tools.model
        self._journal = tools.journal
        self._layout = tools.layout
        self._job = tools.config.name
        self._steps_per_version = tools.config.steps_per_version
        self._follower = follower
        self._read_config = tools.read_config
        self.history = of_ranks(tools.config)
        """The optimizer of each step, as it is in this term."""
        self.changes = tools.config.changes
        self.steps = tools.steps
        """Where the job ends in this term: what it was told, or what the script says; None: never."""
        self._log = logs.get_logger()
        self._standing: Standing | None = None
        self._needed = (0, 0)
        """Term and revision of the newest plan that is known to be there. Revisions are counted anew when ZooKeeper has
        lost the plan; terms only grow."""
        self._progress = tools.progress
        self._waits = tools.progress.waits
        self._asked: Callable[[], str] | None = None
        """What is waited for outside of steps, for people."""
        self._durable: set[str] = set()
        self._confirmed: set[str] = set()
        """Servers that have answered since :meth:`confirm` asked them."""
        self.failpoints = failpoints.are_on()
        self.recording = tools.journal.enabled
        """Both are asked once: a step passes many places that do something for tests only."""
        self.leaving = False
        """The worker was told to leave, by a signal."""
        self.stands = False
        """Whether this worker stands in the newest plan's term with all servers, as far as it knows."""
        self.term: int | None = None
        """The term in which it stands; None: what it has and what servers have must be compared."""
        self.held: tuple[int, ...] = ()
        """The ranks that the plan gives to this worker ..."""
        self.cells: tuple[Cell, ...] = ()
        """... and which stages of them, both once all moves are made; :meth:`cells_at` tells those of a step."""
        self.owners: frozenset[str] = frozenset()
        """The servers that own what changes."""
        self.arrived: dict[int, int] = {}
        """By shard, the newest version that has come by value on these connections. The follower notes it."""
        self._frozen_missing = tools.layout.shards_of(TensorRole.FROZEN)

    # --- the plan

    def settle(self) -> bool:
        """Follow the newest plan and stand in its term; False if that is not possible yet."""
        standing = self._membership.standing
        if standing.failure is not None:
            raise standing.failure
        plan = standing.plan
        if plan is None or not plan.owners:
            return False
        if (plan.term, plan.revision) < self._needed:
            # There is a newer one: this came from a ZooKeeper server that is behind, or before the newer one.
            self._membership.refresh()
            return False
        if plan.term != self.term:
            self.lose(f"term {plan.term}")
            self._adopt(standing, plan)
            try:
                self._take_changes(self._read_config())
            except DependencyUnreachable as error:
                what = "Redis and ZooKeeper, to know the job as it is now"
                self._waits.on(SERVERS, what, str(error), say_after_s=0.0)
                return False
            if not (self._servers.connect(self._job, standing.member) and self._follower.load(plan)):
                return False
            self.term = plan.term
        elif standing is not self._standing:
            self._adopt(standing, plan)
            self._follower.replanned()
        self.stands = True
        return self._membership.standing is standing or self.settle()

    def _take_changes(self, config: JobConfig) -> None:
        self.changes = config.changes
        self.history = of_ranks(config)
        steps = steps_set(config.changes)
        if steps is not None and steps != self.steps:
            self._log.info("the job ends where it was told to, not where its script says", steps=steps)
            self.steps = steps

    @property
    def last_version(self) -> int | None:
        """That with which the job ends; None: never."""
        return None if self.steps is None else self.steps // self._steps_per_version

    def look(self) -> None:
        """Notice a newer plan, if there is one."""
        if self._membership.standing is not self._standing:
            self.stands = False

    def _adopt(self, standing: Standing, plan: Plan) -> None:
        self._standing, self.plan = standing, plan
        self.held, self.cells = standing.held, standing.cells
        self.owners = frozenset(plan.owner_of(shard.index).id for shard in self._layout.versioned)
        self._servers.follow(plan)

    def cells_at(self, step: int) -> tuple[Cell, ...]:
        """The cells that are computed here in a step, as the plan that is followed says."""
        return self._standing.cells_at(step) if self._standing is not None else ()

    @property
    def newest(self) -> Standing:
        """The plan that is known, and the ranks that it gives to this worker, whether or not it is followed already."""
        return self._membership.standing

    def term_is_over(self) -> bool:
        """Whether there is a newer term, or the worker is to leave."""
        newest = self.newest.plan
        return newest is None or newest.term != self.plan.term or self.leaving

    def plan_is_over(self) -> bool:
        """Whether there is a newer plan, or the worker is to leave."""
        return self._membership.standing is not self._standing or self.leaving

    def compare_again(self) -> None:
        """What this worker has and what servers have may differ: begin the term again."""
        self.term, self.stands = None, False

    def lose(self, why: str) -> None:
        """What was in flight is unknown: connect and compare again. Servers recognise what they already have."""
        self._log.debug("connecting anew", why=why)
        self._servers.disconnect()
        self._model.hide()
        self.arrived.clear()
        self.compare_again()
        self._follower.lost()

    # --- listening

    def wait(self, timeout_s: float = WAIT_S) -> bool:
        """Send what could not be sent, and take what servers answer as soon as one does; False: a server is gone."""
        try:
            answers = self._servers.pump(timeout_s)
        except Disconnected as error:
            self.lose(str(error))
            return False
        if not answers and timeout_s:
            self._note_wait()
        for answer in answers:
            kind = answer.header.kind
            if kind is Kind.DURABLE:
                self._durable.add(answer.server)
            elif kind is Kind.REFUSED:
                self._refused(answer)
            else:
                if kind is Kind.CLOCKS:
                    self._confirmed.add(answer.server)
                self._follower.take(answer)
        if self._membership.standing is not self._standing:
            self.stands = False
        return True

    def _note_wait(self) -> None:
        """Nothing has come: what is waited for?"""
        if self._asked is not None:
            what = self._asked()
        elif self.stands:
            what = self._follower.awaited
        else:
            return  # for a plan, or for a connection: said where that is tried
        if what:
            self._waits.on(SERVERS, what, say_after_s=max(SAY_AFTER_S, _USUAL * self._progress.step_s))
        else:
            self._waits.over(SERVERS)

    def _refused(self, answer: Answer) -> None:
        if not is_about_plan(answer.header.reason):
            raise Refused(f"a server refused this worker: {answer.text}")
        self._needed = max(self._needed, (answer.header.term, answer.header.revision))
        self._membership.refresh()
        self.stands = False
        self._follower.refused(answer.header)

    def expect(self, term: int) -> None:
        """Follow no plan of an earlier term any more: this one has begun."""
        self._needed = max(self._needed, (term, 0))
        self._membership.refresh()
        self.stands = False

    def ask(
        self, send: Callable[[], None], done: Callable[[], bool], over: Callable[[], bool], what: Callable[[], str]
    ) -> bool:
        """Send a question and listen until it is answered; False if it is over before, or a server is gone.

        ``what``: that is waited for, for people.
        """
        self._asked = what
        try:
            send()
            while not done():
                if over():
                    self.look()  # or the caller, which still stands, would ask again at once, and again
                    return False
                if not self.wait():
                    return False
            return True
        finally:
            self._asked = None
            self._waits.over(SERVERS)

    def confirm(self) -> bool:
        """Have all servers take, or refuse, what was sent to them so far: each answers something then; False if the
        term is over before."""
        servers = {server.id for server in self.plan.servers}
        self._confirmed.clear()
        return self.ask(
            lambda: self._servers.ask_clocks(servers),
            lambda: self._confirmed >= servers,
            self.term_is_over,
            lambda: f"{names(sorted(servers - self._confirmed))} to confirm what was sent",
        )

    def pull(self, shards: Sequence[Shard], version: int, over: Callable[[], bool]) -> bool:
        """Have these shards at this version or a newer one, and the frozen ones; False if it is over before."""
        wanted = {shard.index: version for shard in shards} | {shard.index: 0 for shard in self._frozen_missing}

        def missing() -> list[int]:
            return [shard for shard, at_least in wanted.items() if self.arrived.get(shard, -1) < at_least]

        def send() -> None:
            for shard in missing():
                self._servers.pull(shard, wanted[shard])

        def what() -> str:
            late = missing()
            return f"version {version} of {count(len(late), 'shard')} from {self._owners_of(late)}"

        if not self.ask(send, lambda: not missing(), over, what):
            return False
        self._frozen_missing = ()
        return True

    def want_frozen(self, shards: Sequence[Shard]) -> None:
        """Have the next :meth:`pull` bring these frozen shards, and no others."""
        self._frozen_missing = tuple(shards)

    def finish(self, servers: Iterable[str], version: int) -> bool:
        """Have these servers commit the job's last version; False if there is something else to do before."""
        finished = self.make_durable(servers, version)
        if finished:
            self._journal.record("finished", version=version)
        return finished

    def make_durable(self, servers: Iterable[str], version: int) -> bool:
        """Have these servers commit a version that they have; False if there is something else to do before."""
        self._durable.clear()
        wanted = set(servers)
        return self.ask(
            lambda: self._servers.finish(wanted, version),
            lambda: self._durable >= wanted,
            self.plan_is_over,
            lambda: f"{names(sorted(wanted - self._durable))} to make version {version} durable",
        )

    def _owners_of(self, shards: Iterable[int]) -> str:
        return names(dict.fromkeys(self.plan.owner_of(shard).id for shard in shards))

    def _place(self, header: Header) -> memoryview:
        if header.shard >= len(self._layout.shards):
            raise Refused(f"PARAMS of shard {header.shard}, which does not exist")
        return self._follower.place(header, self._layout.shards[header.shard])
