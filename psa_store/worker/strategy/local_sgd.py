"""The strategy in rounds (local): a rank makes steps of its own, and pushes by how much it has moved.

What is to be done next decides :class:`psa_store.consistency.rounds.Rounds`;
:meth:`LocalSGDStrategy.next_rank_step` is the loop that executes it.

Global parameters that a server sends never go into the model while a rank computes in it: they wait in memory of their
own until a round begins. So a connection may break at any time, and what a rank has computed stays.

A shard that is exchanged at the end of a round (with fragments not all are) gets the global parameters of the version
that the round makes, before the next round begins. With overlap no rank waits for that: the shard gets the global
parameters of the version before and the rank's own movement on top, and the new version has a whole round to come.

The state of a rank is pushed with every round that makes a version to be committed, so at such a version servers can
give it to the rank's next holder. Ranks change hands only where a term begins, and a term begins at such a version.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psa_store import logs
from psa_store.cluster import Plan
from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.consistency.rounds import EndRound, Push, Rounds, Watch
from psa_store.consistency.worker_instructions import Await, Compute, Finish, Listen
from psa_store.errors import UsageError
from psa_store.job.layout import Shard
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.tensors import as_bytes
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Flag, Header, Kind
from psa_store.worker.batches import RankStep
from psa_store.worker.flat_model import FlatModel
from psa_store.worker.gradients import GradientMemory, GradientPool
from psa_store.worker.pushing import digest, record_pushed, refuse
from psa_store.worker.rank_state import RankStates
from psa_store.worker.server_connections import Answer
from psa_store.worker.session import PlanSession, Tools
from psa_store.worker.strategy.base import describe
from psa_store.worker.strategy.global_parameters import GlobalParameters
from psa_store.worker.strategy.local_rank import LocalRank


class LocalSGDStrategy:
    """See :class:`psa_store.worker.strategy.base.Strategy`, and the module."""

    def __init__(self, tools: Tools, model: FlatModel) -> None:
        config, layout = tools.config, tools.layout
        if tools.steps is not None:
            config.check_steps(tools.steps)
        self._round_steps = config.mode.round_steps
        last = None if tools.steps is None else tools.steps // self._round_steps
        self._rounds = Rounds(last, self._round_steps, overlap=config.mode.overlap)
        self.session = PlanSession(tools, self)
        self.version = 0
        self._config = config
        self._layout = layout
        self._mode = config.mode
        self._servers = tools.servers
        self._flat_model = model
        self._journal = tools.journal
        self._log = logs.get_logger()
        # A gradient that does not travel is not rounded for the way.
        self._pool = GradientPool(layout, WireLayout(layout))
        self._states = RankStates(tools, self.session)
        self._parameters = GlobalParameters(tools, model)
        self._gradients: GradientMemory
        self._turn: RankStep
        """What is being computed ..."""
        self._begins_round: bool
        """... and whether it is the rank's first step in its round."""
        self._ranks: dict[int, LocalRank] = {}
        self._term: int | None = None
        """The term in which the held ranks began."""

    # --- what the worker calls

    def next_rank_step(self) -> RankStep | None:
        session, machine = self.session, self._rounds
        while not session.leaving:
            if not session.settle():
                session.wait()
                continue
            match machine.next():
                case Compute(step, rank):
                    session.wait(0.0)  # between two steps: receive what is there, and send what can be sent
                    if session.term is not None:
                        self._turn = RankStep(step, rank)
                        self._begins_round = step % self._round_steps == 0
                        if self._begins_round:
                            self._ranks[rank].show()
                        self._gradients = self._pool.take()
                        return self._turn
                case Push(rank, number):
                    self._push_round(rank, number)
                    machine.pushed(rank)
                case Await(version, servers):
                    self._servers.wait_for(servers, version)
                case EndRound(number, adopt):
                    if adopt:
                        self._adopt(number)
                    else:
                        self._parameters.keep_buffers()
                case Listen() | Watch(last=None):
                    session.wait()
                case Watch(int() as last):
                    if session.finish(session.owners, last):
                        machine.ended()
                case Finish(last):
                    if self._fetch_last(last) and session.finish(session.owners, last):
                        return None
        return None

    def begin(self, rank_step: RankStep) -> None:
        if self._begins_round:
            number = self._rounds.round
            self._journal.record("computing", term=self.session.term, step=number, rank=rank_step.rank, stage=0)
        self._flat_model.begin(self._gradients, None, keep_buffers=not self._begins_round)

    def hand_over(self) -> None:
        """Make the rank's own step."""
        turn, rank = self._turn, self._ranks[self._turn.rank]
        factor = self._grad_factor()
        if factor is not None:
            rank.apply(self._gradients, turn.step, factor, self.session.history.at(turn.step))
        self._pool.release()
        self._flat_model.show_parameters()
        self.version = turn.step + 1
        if self._rounds.stepped(turn.rank):
            self._flat_model.collect_buffers()
            rank.leave_model(with_buffers=turn.rank == RANK_OF_BUFFERS)

    # --- the life of a round

    def _refuse_late_buffers(self, state: LocalRank) -> None:
        """With overlap buffers come a round late, but not after a resume."""
        if not self._mode.overlap or self._mode.forget:
            return
        if any(not torch.equal(value, self._parameters.round_buffers[shard]) for shard, value in state.buffers):
            raise UsageError(
                f"mode {self._mode}: this model changes its buffers (batch norm?), which with overlap could not be "
                "repeated after a death. Leave out overlap, or add forget."
            )

    def _grad_factor(self) -> float | None:
        """What to multiply the gradient by before it is applied; None to skip it.

        Raises:
            NonFiniteGradient: it holds NaN or Inf, and the job refuses such.
        """
        gradients, turn = self._gradients, self._turn
        flaw = gradients.first_flaw()
        if flaw:
            if not self._config.skip_nonfinite:
                refuse(turn, flaw)
            self._log.warning("skipping a step with NaN or Inf gradients", step=turn.step, rank=turn.rank)
            return None
        if gradients.note.weight == 0.0:
            return None
        clip = self.session.history.at(turn.step).clip_grad_norm
        return 1.0 if clip is None else gradients.clip_factor(clip)

    def _push_round(self, rank: int, number: int) -> None:
        """Push what this rank has moved in the shards that are exchanged now, and its state, if that is due."""
        state = self._ranks[rank]
        due = self._states.are_due(number + 1)
        pushes: list[tuple[int, Tensor]] = []
        fingerprint = 0
        for shard in self._parameters.trained:
            payload = []
            if self._mode.exchanges(shard.index, number):
                payload.append(state.movement(shard, number))
                if self.session.recording:
                    fingerprint += digest(self._config, shard, payload[0])
            if due and shard.index in self._states.kept:
                payload.append(self._states.pack(shard.index, state.memory))
            if payload:
                pushes.append((shard.index, payload[0] if len(payload) == 1 else torch.cat(payload)))
        if rank == RANK_OF_BUFFERS:
            self._refuse_late_buffers(state)
            pushes += [(shard, value.view(torch.uint8)) for shard, value in state.buffers]
        state.pushed, state.pushed_round = pushes, number
        self._push_kept(rank)
        record_pushed(self.session, self._journal, number, rank, {0: fingerprint})

    def _push_kept(self, rank: int) -> None:
        state = self._ranks[rank]
        flags = Flag.STATE if self._states.are_due(state.pushed_round + 1) else Flag.NONE
        for shard, payload in state.pushed:
            self._servers.push_value(state.pushed_round, rank, shard, as_bytes(payload), flags)

    def _adopt(self, exchanged_in: int) -> None:
        """Continue from the global parameters in the shards that were exchanged in that round."""
        self._parameters.keep_buffers()
        for rank in self._ranks.values():
            rank.adopt(exchanged_in)

    # --- versions

    def _fetch_last(self, version: int) -> bool:
        """Have what came of the last round in the model; False if there is something else to do before."""
        if self._rounds.have != version:
            if not self.session.pull(self._layout.versioned, version, self.session.term_is_over):
                return False
            self._rounds.pulled(version)
        self._parameters.show()
        self.version = version * self._round_steps
        return True

    # --- terms

    def load(self, plan: Plan) -> bool:
        """Stand in a term: at its beginning, or where the ranks were in it."""
        self._rounds.ends_at(self.session.last_version)
        if plan.term != self._term:
            self._term = None
            if not self._begin_term(plan):
                return False
            self._term = plan.term
            self._journal.record("loaded", term=plan.term, version=plan.resume)
            failpoint("worker.loaded")
        self.replanned()
        for rank in self._ranks:
            self._push_kept(rank)
        return True

    def replanned(self) -> None:
        self._rounds.planned(self.session.owners)

    def lost(self) -> None:
        self._rounds.lost()

    def refused(self, header: Header) -> None:
        self.session.compare_again()

    def _begin_term(self, plan: Plan) -> bool:
        """Take up the held ranks where the term begins; False if the plan or a connection changed meanwhile."""
        if not self.session.pull(self._layout.versioned, plan.resume, self.session.term_is_over):
            return False
        # A rank goes on with the state that is here where servers keep none.
        known = {rank: state.memory for rank, state in self._ranks.items()} if self._mode.forget else {}
        self._ranks = {
            rank: LocalRank(rank, self._config, self._layout, self._parameters, known.get(rank))
            for rank in self.session.held
        }
        self.version = plan.resume * self._round_steps
        self._parameters.keep_buffers()
        for version in range(plan.resume - self._mode.fragments, plan.resume):
            self._adopt(version)
        if not self._states.pull(plan.resume, {rank: state.memory for rank, state in self._ranks.items()}):
            return False
        if not self._mode.overlap:
            self._adopt(plan.resume - 1)  # what was pushed with a round is older than what came of it
        self._rounds.term_begun(plan.resume, self._ranks)
        return True

    # --- servers

    @property
    def awaited(self) -> str:
        return describe(self._rounds.awaits)

    def place(self, header: Header, shard: Shard) -> memoryview:
        return self._parameters.place(header, shard)

    def take(self, answer: Answer) -> None:
        header = answer.header
        match header.kind:
            case Kind.PARAMS:
                self._parameters.take(header, answer.payload)
                if not header.flags & Flag.MOVEMENT:
                    self.session.arrived[header.shard] = header.step
            case Kind.VERSION:
                if self._rounds.brought(answer.server, header.step):
                    self._all_brought(header.step)
            case Kind.STATE:
                self._states.take(answer)
            case _:
                pass

    def _all_brought(self, version: int) -> None:
        """What was pushed for it need not be kept."""
        self._journal.record("acked", term=self.session.term, version=version)
        for state in self._ranks.values():
            if state.pushed_round < version:
                state.pushed = []
