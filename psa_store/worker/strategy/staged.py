"""The synchronous strategy of a model in stages: this worker computes cells, and sends others what theirs need.

What is to be done next decides :class:`psa_store.consistency.cell_step.CellStep`. While a rank is computed the worker
listens: activations and gradients come through the relay of a server, and a plan may give it more cells, or less. A
cell of a rank that comes before the present one ends that one's passes; they are made again later. So does a new term:
what was sent in the former one is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from psa_store.cluster import Cell, Plan, Server
from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.consistency.cell_step import CellStep, Confirm
from psa_store.consistency.worker_instructions import Await, Listen
from psa_store.errors import UsageError
from psa_store.job.layout import Shard, TensorRole
from psa_store.observe.formatting import numbered
from psa_store.optim.note import PLAIN
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Flag, Header, Kind
from psa_store.worker.batches import RankStep
from psa_store.worker.carry import Parcel, read
from psa_store.worker.gradients import GradientMemory, GradientPool
from psa_store.worker.host_memory import must_suffice
from psa_store.worker.microbatches import microbatches_of
from psa_store.worker.pushing import GradientPush, refuse
from psa_store.worker.rank_passes import RankPasses, ties_of
from psa_store.worker.residuals import Residuals
from psa_store.worker.server_connections import Answer
from psa_store.worker.session import PlanSession, Tools
from psa_store.worker.stages import StagedModel
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
        self._answered: set[str] = set()
        """Servers that have answered what they were asked last."""
        self._over = 0
        """All steps below are complete, as a server says: nothing comes of them any more."""

    # --- what the worker calls

    @property
    def version(self) -> int:
        return self._step.version

    def next_rank_step(self) -> RankStep | None:
        return self._loop.next_rank_step()

    def begin(self, rank_step: RankStep) -> None:
        self._rank_step = rank_step
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
        passes = RankPasses(rank_step, parts, config.stages, self._ties, self._model, config.seed, self._send)
        self._passes, self._term, self._passes_refused = passes, self.session.term, False
        try:
            if not self._hold():
                return None
            while not passes.finished:
                self._progress.wait_for([Cell(rank_step.rank, stage) for stage in passes.waits_for])
                with must_suffice(f"compute {numbered('stage', passes.held)}", self._model.bytes_of(passes.held)):
                    made = passes.turn()
                if not made and not self._listen():
                    return None
                if self.session.plan_is_over() and not self._hold():
                    return None
            self._computed = passes.held
            self._take_gradients(passes)
            return passes.loss
        finally:
            self._passes = None

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
            step, rank = self._rank_step.step, self._rank_step.rank
            if rank == RANK_OF_BUFFERS:
                self._push_buffers(step, computed)
                self._push_state(step, computed)
            push.done(computed)
            self._step.pushed(Cell(rank, stage) for stage in computed)
        else:
            self._pool.unused(self._gradients)
        self._loop.hand_over()

    def _push_buffers(self, step: int, stages: Sequence[int]) -> None:
        """Push those of stages that were computed, but for the script's state."""
        state = self._model.state
        for shard in self._tools.layout.shards_of(TensorRole.BUFFER):
            if shard.home in stages and not (state is not None and shard.index in state.shards):
                data = self._model.flat(shard.home).parameters(shard)
                self._servers.push_value(step, RANK_OF_BUFFERS, shard.index, data)

    def _push_state(self, step: int, stages: Sequence[int]) -> None:
        """Push the script's state, if its stage was computed, which need not be in memory any more."""
        state = self._model.state
        for index in () if state is None else state.shards:
            shard = self._tools.layout.shards[index]
            if shard.home in stages:
                assert state is not None
                is_here = shard.home in self._model.stages
                rest = self._model.flat(shard.home).parameters(shard) if is_here else bytes(shard.size_bytes)
                self._servers.push_value(step, RANK_OF_BUFFERS, index, state.to_push(shard, rest))

    # --- a rank's passes

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
        new = self._model.hold({*self._model.stages, *stages})
        if new and not self._add(new, step):
            return False
        self._gradients.add(new)
        for stage in stages:
            if stage not in passes.held:
                self._model.flat(stage).begin(self._gradients, self._push.push)
                self._push.computing(stage)
                self._want(stage)
        passes.hold(stages)
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
        """Push the gradients of all cells that were computed."""
        for stage in passes.held:
            self.weight = passes.complete(stage)
            self._gradients.note = PLAIN
            flat = self._model.flat(stage)
            flat.end(self.weight)
            flat.collect_buffers()

    def _want(self, stage: int) -> None:
        """Have what is for a cell sent here, what was sent before as well."""
        if self._config.stages > 1:
            step, rank = self._rank_step.step, self._rank_step.rank
            self._servers.want(self._relay_of(stage).id, step, Cell(rank, stage))

    def _send(self, stage: int, microbatch: int, backward: bool, parcel: Parcel) -> None:
        step, rank = self._rank_step.step, self._rank_step.rank
        self._servers.relay(self._relay_of(stage).id, step, Cell(rank, stage), microbatch, backward, parcel)

    def _relay_of(self, stage: int) -> Server:
        """The server through which a cell of the present rank gets what others send it: equal in all workers."""
        servers = self.session.plan.servers
        return servers[(self._rank_step.rank + stage) % len(servers)]

    # --- the step

    def take_gradient_memory(self, step: int, *, shared: bool) -> None:
        stages = self._model.stages
        with must_suffice(f"have the gradients of {numbered('stage', stages)}", self._model.bytes_of(stages)):
            self._gradients = self._pool.take_for(step, stages, shared=shared)

    def execute(self, instruction: object) -> None:
        session, model = self.session, self._model
        match instruction:
            case Await(version, servers):
                if model.hold({cell.stage for cell in session.cells}):
                    session.lose("a stage came back whose cells are pushed already")
                else:
                    model.fill(model.stages)
                    self._servers.wait_for(servers, version, stages=model.stages)
            case Listen():
                session.wait()
            case Confirm():
                self._confirm()
            case _:
                pass

    def _confirm(self) -> None:
        """Ask all servers something: each answers once it has taken, or refused, what was sent to it before."""
        servers = {server.id for server in self.session.plan.servers}
        self._answered.clear()
        if self.session.ask(
            lambda: self._servers.ask_clocks(servers),
            lambda: self._answered >= servers,
            self.session.term_is_over,
        ):
            self._step.confirmed()

    def show(self, version: int) -> None:
        """Let the stages here be at a version of which all their shards are here."""
        self._residuals.shown(version)
        self._model.version_arrived()
        self._servers.carries.release()
        self._step.loaded(self.session.plan.term, version)

    # --- loading

    def load(self, plan: Plan) -> bool:
        """Get all shards of the stages held here at one version of this term."""
        session = self.session
        self._step.ends_at(session.last_version)
        self._model.hold({cell.stage for cell in session.cells})
        newest, wanted = -1, plan.resume
        while newest < wanted:
            newest = wanted
            if not self._pull(self._model.stages, newest):
                return False
            # A step may complete meanwhile: then some shards are a version ahead of others.
            wanted = max(
                (session.arrived[shard.index] for shard in self._versioned(self._model.stages)), default=newest
            )
        if not self._residuals.load(plan.term, newest):
            return False
        self._journal.record("loaded", term=plan.term, version=newest)
        failpoint("worker.loaded")
        self.show(newest)
        self.replanned()
        return True

    def _versioned(self, stages: Sequence[int]) -> list[Shard]:
        return [shard for shard in self._tools.layout.versioned if not set(stages).isdisjoint(shard.stages)]

    def _add(self, stages: Sequence[int], version: int) -> bool:
        """Have more stages at the present version; False if passes are to be given up."""
        if not self._pull(stages, version):
            return False
        if any(self.session.arrived[s.index] != version for s in self._versioned(stages)):
            self.session.lose("the step is complete without the cells that came to this worker")
            return False
        self._model.version_arrived()
        return True

    def _pull(self, stages: Sequence[int], version: int) -> bool:
        """Have the shards of some stages at this version or a newer one; False if the term is over before."""
        session, layout = self.session, self._tools.layout
        frozen = layout.shards_of(TensorRole.FROZEN)
        session.want_frozen([shard for shard in frozen if not set(stages).isdisjoint(shard.stages)])
        self._model.fill(stages)
        shards = self._versioned(stages)
        for shard in shards:
            session.arrived.pop(shard.index, None)
        return session.pull(shards, version, session.term_is_over)

    def replanned(self) -> None:
        self._step.planned(self.session.cells, self.session.owners)

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
            case Kind.CLOCKS:
                self._answered.add(answer.server)
            case _:
                pass

    def _is_of_passes(self, header: Header) -> bool:
        return (header.step, header.rank) == (self._rank_step.step, self._rank_step.rank)

    def _take_parcel(self, answer: Answer) -> None:
        header, passes = answer.header, self._passes
        parcel = read(answer.payload, answer.descriptor)
        if passes is not None and self._is_of_passes(header):
            passes.arrived(header.stage, header.microbatch, bool(header.flags & Flag.BACKWARD), parcel)
