"""The synchronous strategy: all ranks' gradients of a version, then the next version, for all shards alike.

What is to be done next decides :class:`psa_store.consistency.worker_step.WorkerStep`.
"""

from __future__ import annotations

import time

from psa_store.cluster import Plan
from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.consistency.worker_instructions import AskClocks, Await, Listen
from psa_store.consistency.worker_step import WorkerStep
from psa_store.job.layout import Shard, TensorRole
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Header, Kind
from psa_store.worker.batches import RankStep
from psa_store.worker.flat_model import FlatModel
from psa_store.worker.gradients import GradientMemory, GradientPool
from psa_store.worker.pushing import GradientPush, refuse
from psa_store.worker.residuals import Residuals
from psa_store.worker.server_connections import Answer
from psa_store.worker.session import WAIT_S, PlanSession, Tools
from psa_store.worker.strategy.base import describe, place_parameters
from psa_store.worker.strategy.step_loop import StepLoop

_PATIENCE = 0.5
"""Parts of this worker's own step's time after which a missing rank counts as slow."""
_ASK_AGAIN_S = 0.02
"""How often a worker that waits with speculation looks at that time, and asks again which ranks are missing."""


class SyncStrategy:
    """See :class:`psa_store.worker.strategy.base.Strategy`, and the module."""

    def __init__(self, tools: Tools, model: FlatModel) -> None:
        self.session = PlanSession(tools, self)
        self._tools = tools
        self._servers = tools.servers
        self._journal = tools.journal
        self._flat_model = model
        self._step = WorkerStep(tools.steps, may_miss_versions=tools.config.mode.may_miss_versions)
        self._loop = StepLoop(tools, self.session, self._step, self)
        self._pool = GradientPool(tools.layout, tools.wire)
        self._gradients: GradientMemory
        self._residuals = Residuals(tools, self.session)
        self._push = GradientPush(tools, self.session, self._residuals.of)
        self._trained = {shard.index for shard in tools.layout.shards_of(TensorRole.TRAINED)}
        self._buffers = tools.layout.shards_of(TensorRole.BUFFER)
        self._all_push_buffers = tools.config.pushes_all_buffers
        self._speculates = tools.config.mode.speculate
        self._begun_s = self._slow_at_s = 0.0

    # --- what the worker calls

    @property
    def version(self) -> int:
        return self._step.version

    def next_rank_step(self) -> RankStep | None:
        return self._loop.next_rank_step()

    def begin(self, rank_step: RankStep) -> None:
        self._push.begin(rank_step, self._gradients, self._residuals.state_of(rank_step))
        self._push.computing()
        self._flat_model.begin(self._gradients, self._push.push)
        self._begun_s = time.monotonic()

    def hand_over(self) -> None:
        push = self._push
        if push.flaw:
            refuse(push.rank_step, push.flaw)
        step, rank = push.rank_step.step, push.rank_step.rank
        now_s = time.monotonic()
        self._slow_at_s = now_s + _PATIENCE * (now_s - self._begun_s)
        if self._buffers and (rank == RANK_OF_BUFFERS or self._all_push_buffers):
            self._flat_model.collect_buffers()
            for shard in self._buffers:
                self._servers.push_value(step, rank, shard.index, self._flat_model.buffers_as_of_now(shard))
        push.done()
        self._step.pushed(rank)
        self._loop.hand_over()

    # --- the step

    def take_gradient_memory(self, step: int, *, shared: bool) -> None:
        self._gradients = self._pool.take_for(step, shared=shared)

    def execute(self, instruction: object) -> None:
        match instruction:
            case Await(version, servers):
                self._servers.wait_for(servers, version)
            case Listen():
                self.session.wait(_ASK_AGAIN_S if self._speculates else WAIT_S)
                if self._speculates and time.monotonic() >= self._slow_at_s:
                    self._step.slow()
            case AskClocks(servers):
                self._servers.ask_clocks(servers)
            case _:
                pass

    def show(self, version: int) -> None:
        """Let the model, and the ranks held here, be at a version of which all shards are here."""
        self._residuals.shown(version)
        self._flat_model.version_arrived()
        self._step.loaded(version)

    # --- loading

    def load(self, plan: Plan) -> bool:
        """Get all shards at one version of this term."""
        session, versioned = self.session, self._tools.layout.versioned
        self._step.ends_at(session.last_version)
        newest, wanted = -1, plan.resume
        while newest < wanted:
            newest = wanted
            if not session.pull(versioned, newest, session.term_is_over):
                return False
            # A step may complete meanwhile: then some shards are a version ahead of others.
            wanted = max((session.arrived[shard.index] for shard in versioned), default=newest)
        if not self._residuals.load(plan.term, newest):
            return False
        self._journal.record("loaded", term=plan.term, version=newest)
        failpoint("worker.loaded")
        self.show(newest)
        self.replanned()
        return True

    def replanned(self) -> None:
        self._step.planned(self.session.held, self.session.owners)

    def lost(self) -> None:
        self._pool.give_up()
        self._step.lost()

    def refused(self, header: Header) -> None:
        self._step.refused(header.step, header.rank)

    @property
    def awaited(self) -> str:
        return describe(self._step.awaits)

    def place(self, header: Header, shard: Shard) -> memoryview:
        self._step.overwritten()
        return place_parameters(self._flat_model, header, shard)

    def take(self, answer: Answer) -> None:
        header = answer.header
        match header.kind:
            case Kind.VERSION:
                self._step.brought(answer.server, header.step)
                if answer.descriptor is not None:
                    owned = self.session.plan.shards_of(answer.server)
                    self._flat_model.show(answer.server, answer.descriptor, [i for i in owned if i in self._trained])
            case Kind.PARAMS:
                self.session.arrived[header.shard] = header.step
            case Kind.STATE:
                self._residuals.take(answer)
            case Kind.CLOCKS:
                self._step.told(answer.server, answer.clocks[: self._tools.config.ranks])
            case _:
                pass
