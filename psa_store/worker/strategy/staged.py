"""The synchronous strategy of a model in stages: this worker computes cells, and sends others what theirs need.

What is to be done next decides :class:`psa_store.consistency.cell_step.CellStep`. While a rank is computed the worker
listens: activations and gradients come through the relay of a server, and a plan may give it more cells, or less. A
cell of a rank that comes before the present one ends that one's passes; they are made again later. So does a new term:
what was sent in the former one is gone.

A worker that can not have all its stages in memory at once has some after the others, and pushes the gradients of a
stage before it goes. There, each change of cells ends the passes of a rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from psa_store.cluster import Cell, Plan
from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.consistency.cell_step import CellStep, Confirm
from psa_store.consistency.residence import Residence
from psa_store.consistency.worker_instructions import Await, Listen
from psa_store.errors import UsageError
from psa_store.job.layout import Shard, TensorRole
from psa_store.observe.formatting import cells, names, numbered
from psa_store.optim.note import PLAIN
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Flag, Header, Kind
from psa_store.worker.batches import RankStep
from psa_store.worker.carry import read
from psa_store.worker.gradients import GradientMemory, GradientPool
from psa_store.worker.host_memory import must_suffice
from psa_store.worker.microbatches import microbatches_of
from psa_store.worker.pushing import GradientPush, refuse
from psa_store.worker.rank_passes import RankPasses, ties_of
from psa_store.worker.residuals import Residuals
from psa_store.worker.server_connections import Answer
from psa_store.worker.session import PlanSession, Tools
from psa_store.worker.stage_buffers import StageBuffers
from psa_store.worker.stage_loading import StageLoading
from psa_store.worker.stages import StagedModel
from psa_store.worker.strategy.base import describe
from psa_store.worker.strategy.cell_messages import CellMessages
from psa_store.worker.strategy.step_loop import StepLoop


class StagedStrategy:
    """See :class:`psa_store.worker.strategy.base.Strategy`, and the module."""

    def __init__(self, tools: Tools, model: StagedModel) -> None:
        self.session = PlanSession(tools, self)
        self._tools = tools
        self._servers = tools.servers
        self._journal = tools.journal
        self._config = tools.config
        self._model = model
        self._progress = tools.progress
        self._step = CellStep(tools.steps)
        self._loop = StepLoop(tools, self.session, self._step, self)
        self._pool = GradientPool(tools.layout, tools.wire)
        self._gradients: GradientMemory
        self._residuals = Residuals(tools, self.session)
        self._push = GradientPush(tools, self.session, self._residuals.of)
        self._rank_step: RankStep
        self._loading = StageLoading(tools.layout, self.session, model)
        self._messages = CellMessages(tools.servers, self.session)
        self._buffers = StageBuffers(tools, model)
        self._ties = ties_of(tools.layout)
        self._passes: RankPasses | None = None
        """Of the rank that is computed now."""
        self._computed: tuple[int, ...] | None = None
        """The stages whose gradients are whole, from ``compute()`` to the end of the step; None before it."""
        self._passes_refused = False
        self.weight = 1.0
        """Of the rank that was computed last, in the mean over ranks."""
        self._term: int | None = None
        """In which the passes began."""
        self._over = 0
        """All steps below are complete, as a server says: nothing comes of them any more."""

    # --- what the worker calls

    @property
    def version(self) -> int:
        return self._step.version

    def next_rank_step(self) -> RankStep | None:
        return self._loop.next_rank_step()

    def begin(self, rank_step: RankStep) -> None:
        self._rank_step = self._messages.rank_step = rank_step
        self._computed = None
        self._push.begin(rank_step, self._gradients, self._residuals.state_of(rank_step))

    def compute(self, batch: Any) -> Tensor | None:
        """Make all passes of the cells here of the present rank; the loss, where its last stage is.

        None, too, if the job went on in another way meanwhile; the batch comes again where it is still wanted.

        Raises:
            UsageError: the batch can not be cut, or a stage is not as it should be.
        """
        if self._computed is not None:
            raise UsageError("worker.compute() was called twice for one batch")
        self._computed = ()
        rank_step, config = self._rank_step, self._config
        parts = microbatches_of(batch, config.microbatches)
        passes = RankPasses(rank_step, parts, config.stages, self._ties, self._model, config.seed, self._messages.send)
        self._passes, self._term, self._passes_refused = passes, self.session.term, False
        try:
            if self._make(passes):
                return passes.loss
        finally:
            self._passes = None
        self._give_up()
        return None

    @property
    def computed(self) -> tuple[int, ...] | None:
        """The stages that ``compute()`` has made of the present batch; None before it."""
        return self._computed

    def hand_over(self) -> None:
        computed, push = self._computed, self._push
        assert computed is not None
        self._computed = None
        if computed:
            if push.flaw:
                refuse(push.rank_step, push.flaw)
            if self._rank_step.rank == RANK_OF_BUFFERS:
                self._buffers.push_state(self._rank_step.step, computed)
            push.done(computed)
            self._step.pushed(Cell(self._rank_step.rank, stage) for stage in computed)
        else:
            self._pool.unused(self._gradients)
        self._loop.hand_over()

    # --- a rank's passes

    def _make(self, passes: RankPasses) -> bool:
        """Make all passes, and push the gradients; False if they are to be given up."""
        if not self._hold():
            return False
        rank = self._rank_step.rank
        while not passes.finished:
            self._progress.wait_for([Cell(rank, stage) for stage in passes.waits_for])
            due = passes.residence_due
            if due is not None:
                if not self._reside(due):
                    return False
            else:
                here = passes.resident
                with must_suffice(f"compute {numbered('stage', here)}", self._model.bytes_of(here)):
                    made = passes.turn()
                if not made and not self._listen():
                    return False
            if self.session.plan_is_over() and not self._hold():
                return False
        self._take_gradients(passes)
        return True

    def _give_up(self) -> None:
        """What was pushed of the rank's gradient is pushed once more, with the rest: servers must not read both."""
        if self._computed:
            self._computed = ()
            self.session.lose("the passes of a rank were given up when a part of its gradient was pushed")

    def _hold(self) -> bool:
        """Follow the newest plan in the middle of passes; False if they are to be given up."""
        session, passes = self.session, self._passes
        assert passes is not None
        if session.term_is_over() or not (session.stands or session.settle()) or session.term != self._term:
            return False
        step, rank = self._rank_step.step, self._rank_step.rank
        if step != self._step.version or self._step.first != rank:
            return False
        stages = self._step.missing(rank)
        new = [stage for stage in stages if stage not in passes.held]
        if self._model.resident_max is None:
            if not self._begin(new, {*self._model.stages, *stages}):
                return False
        elif passes.held not in ((), stages):
            return False
        for stage in new if self._config.stages > 1 else ():
            self._messages.want(stage)
        passes.hold(stages)
        return True

    def _reside(self, due: Residence) -> bool:
        """Have the stages in memory that are due; False if passes are to be given up."""
        passes, servers, most = self._passes, self._servers, self._model.resident_max
        assert passes is not None and most is not None
        self._take_gradients(passes)
        if not servers.shares:  # where they are read in place, memory of a rank's gradients is one for all stages
            while self._computed and servers.sending:
                if not self._listen():
                    return False
            self._gradients = self._pool.take_for(self._rank_step.step, (), shared=False)
        self._push.go_on(self._gradients)
        wanted = self._loading.wanted(self._rank_step.step)
        together = {*due.stages, *wanted.intersection(self._model.stages)}
        if not self._begin(due.stages, together if len(together) <= most else due.stages, backward=due.backward):
            return False
        passes.reside(due)
        return True

    def _begin(self, stages: Sequence[int], together: Iterable[int], *, backward: bool = True) -> bool:
        """Have these stages as they are at the version, to compute them; False if passes are to be given up.

        ``together``: all that are to be in memory then. ``backward``: they will have gradients.
        """
        new = self._model.hold(together)
        if new and not self._loading.add(new, self._rank_step.step):
            return False
        if backward:
            with must_suffice(f"have the gradients of {numbered('stage', stages)}", self._model.bytes_of(stages)):
                self._gradients.add(stages)
        for stage in stages:
            self._model.flat(stage).begin(self._gradients, self._push.push)
            if backward:
                self._push.computing(stage)
        return True

    def _listen(self) -> bool:
        """Wait for what other workers send; False if passes are to be given up."""
        if not self.session.wait() or self.session.term_is_over():
            return False
        if self._over > self._rank_step.step:
            self.session.lose("the step is complete without the cells that came here")
            return False
        return not self._passes_refused

    def _take_gradients(self, passes: RankPasses) -> None:
        """Push the gradients that have become whole, and with rank 0's the buffers."""
        assert self._computed is not None
        for stage in passes.whole:
            if stage not in self._computed:
                self.weight = passes.complete(stage)
                self._gradients.note = PLAIN
                flat = self._model.flat(stage)
                flat.end(self.weight)
                flat.collect_buffers()
                if self._rank_step.rank == RANK_OF_BUFFERS and not self._push.flaw:
                    self._buffers.push(self._rank_step.step, stage)
        self._computed = passes.whole
        if self._model.resident_max is not None and self._servers.shares:
            self._gradients.clear()

    # --- the step

    def take_gradient_memory(self, step: int, *, shared: bool) -> None:
        stages = self._model.stages if self._model.resident_max is None else ()  # those come one after the other
        with must_suffice(f"have the gradients of {numbered('stage', stages)}", self._model.bytes_of(stages)):
            self._gradients = self._pool.take_for(step, stages, shared=shared)

    def execute(self, instruction: object) -> None:
        session, model = self.session, self._model
        match instruction:
            case Await(version, servers):
                # A stage that is not here, and comes with that version, is loaded when it is to be computed.
                model.hold(self._loading.wanted(version).intersection(model.stages))
                model.fill(model.stages)
                self._servers.wait_for(servers, version, stages=model.stages)
            case Listen():
                session.wait()
            case Confirm():
                if session.confirm():
                    self._step.confirmed()
            case _:
                pass

    def show(self, version: int) -> None:
        """Let the stages here be at a version of which all their shards are here."""
        self._residuals.shown(version)
        self._model.version_arrived()
        self._servers.carries.release()
        self._step.loaded(self.session.plan.term, version)

    # --- loading

    def load(self, plan: Plan) -> bool:
        """Get all shards of the stages held here at one version of this term."""
        self._step.ends_at(self.session.last_version)
        newest = self._loading.begin(plan, self._step.version)
        if newest is None or not self._residuals.load(plan.term, newest):
            return False
        self._journal.record("loaded", term=plan.term, version=newest)
        failpoint("worker.loaded")
        self.show(newest)
        if not self._model.stages:
            self._step.loaded_nothing()
        self.replanned()
        return True

    def replanned(self) -> None:
        session = self.session
        self._step.planned(session.cells, session.owners, session.cells_at(0), session.plan.moved_at)

    def lost(self) -> None:
        self._pool.give_up()
        self._servers.carries.give_up()
        self._step.lost()
        self._over = 0

    def refused(self, header: Header) -> None:
        """A push or a parcel is not taken: what came of this rank has to be made again, if it stays here."""
        self._step.refused(header.step, header.rank)
        if self._passes is not None and self._is_of_passes(header):
            self._passes_refused = True

    @property
    def awaited(self) -> str:
        plan, others = self.session.plan, self._progress.awaited
        if not others:
            return describe(self._step.awaits)
        holders = sorted({plan.holder(cell.rank, cell.stage, self._step.version) or "no worker" for cell in others})
        return f"what {cells(others)} must send first ({names(holders)})"

    def place(self, header: Header, shard: Shard) -> memoryview:
        return self._model.place(shard)

    def take(self, answer: Answer) -> None:
        header = answer.header
        match header.kind:
            case Kind.VERSION:
                self._step.brought(answer.server, header.step)
                if answer.descriptor is not None:
                    self._model.publishes(answer.server, answer.descriptor)
                if header.flags & Flag.BY_REFERENCE:
                    trained = {shard.index for shard in self._tools.layout.shards_of(TensorRole.TRAINED)}
                    owned = self.session.plan.shards_of(answer.server)
                    self._model.show(answer.server, [shard for shard in owned if shard in trained])
            case Kind.PARAMS:
                self.session.arrived[header.shard] = header.step
            case Kind.RELAY:
                self._take_parcel(answer)
            case Kind.STATE:
                self._residuals.take(answer)
            case Kind.WANT:
                self._over = header.step
            case _:
                pass

    def _is_of_passes(self, header: Header) -> bool:
        return (header.step, header.rank) == (self._rank_step.step, self._rank_step.rank)

    def _take_parcel(self, answer: Answer) -> None:
        header, passes = answer.header, self._passes
        parcel = read(answer.payload, answer.descriptor)
        if passes is not None and self._is_of_passes(header):
            passes.arrived(header.stage, header.microbatch, bool(header.flags & Flag.BACKWARD), parcel)
