"""The course in rounds (local): a rank makes steps of its own, and pushes by how much it has moved.

One version is one round. Per rank of ours and round::

    COMPUTING ──its last step──▶ COMPUTED ──▶ PUSHED ──all of ours──▶ the next round, COMPUTING

Global parameters that a server sends never go into the model while a rank computes in it: they wait in memory of their
own until a round begins. So a connection may break at any time, and what a rank has computed stays.

A shard that is exchanged at the end of a round (with fragments not all are) gets the global parameters of the version
that the round makes, before the next round begins. With overlap nobody waits for that: the shard gets the global
parameters of the version before and the rank's own movement on top, and the new version has a whole round to come.

What a rank carries is pushed with every round that makes a version to be committed, so at such a version servers can
give it to whoever gets the rank. Ranks change hands only where a term begins, and a term begins at such a version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch import Tensor

from psa_store.cluster import Plan
from psa_store.compression.codec import decode, encode
from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.errors import Disconnected, NonFiniteGradient, UsageError
from psa_store.job.layout import Shard, TensorRole
from psa_store.job.sampling import rounding_stream
from psa_store.job.wire_layout import WireLayout
from psa_store.optim import from_dict
from psa_store.optim.kernels import ShardKernel, init_slots, make_scratch
from psa_store.optim.rank_state import LOCAL, RESIDUAL, START
from psa_store.optim.reduce import clip_factor
from psa_store.optim.slots import MASTER
from psa_store.optim.tensors import as_bytes, to_torch
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Flag, Header, Kind
from psa_store.worker.batches import RankStep
from psa_store.worker.rank_memory import RankMemory
from psa_store.worker.server_connections import Answer
from psa_store.worker.strategy.base import NONE, Strategy, Tools


class _Stage(Enum):
    COMPUTING = auto()
    COMPUTED = auto()
    PUSHED = auto()


@dataclass(slots=True)
class _Rank:
    """One rank of ours in the present round. ``done``: its steps in it."""

    memory: RankMemory
    kernels: Mapping[int, ShardKernel]
    stage: _Stage = _Stage.COMPUTING
    done: int = 0
    buffers: list[tuple[int, Tensor]] = field(default_factory=list)
    """Those of the model after its last step, by shard, where they are everybody's."""
    pushed: list[tuple[int, Tensor]] = field(default_factory=list)
    """What it pushed last, by shard, until the version is here: a connection may break."""
    pushed_step: int = NONE


class LocalSGDStrategy(Strategy):
    """See the module."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        config, layout = tools.config, tools.layout
        self._mode = config.mode
        self._optimizer = from_dict(config.optimizer)
        self._trained = layout.shards_of(TensorRole.TRAINED)
        self._buffers = layout.shards_of(TensorRole.BUFFER)
        if tools.steps is not None and tools.steps % self._mode.steps:
            raise UsageError(
                f"steps={tools.steps}: mode {config.mode} ends after whole rounds; use a multiple of {self._mode.steps}"
            )
        self._rounds = None if tools.steps is None else tools.steps // self._mode.round_steps
        wire = WireLayout(layout, config.compression)
        self._model = {
            s.index: torch.frombuffer(self._flat_model.parameters(s), dtype=to_torch(s.dtype)) for s in self._changing
        }
        self._global = {s.index: torch.zeros(s.numel, dtype=to_torch(wire.dtype(s))) for s in self._changing}
        """The newest global parameters and buffers, as they come."""
        self._scratch = make_scratch()
        self._ranks: dict[int, _Rank] = {}
        self._round = 0
        self._have = NONE
        """The version that the global parameters are."""
        self._asked = NONE
        """The version that servers were asked to bring."""
        self._versions: dict[int, int] = {}
        """That of each global shard: a movement that comes a second time, after a lost connection, is known by it."""
        self._brought: set[str] = set()
        self._round_buffers: dict[int, Tensor] = {}
        """The buffers with which a rank begins the present round."""
        self._term = NONE
        self._frozen_loaded = False
        self._to_pull: set[int] = set()

    @property
    def _changing(self) -> tuple[Shard, ...]:
        return self._trained + self._buffers

    # --- what the worker calls

    def next_rank_step(self) -> RankStep | None:
        while not self._told_to_leave:
            plan = self._settle()
            if plan is None or self._plan_is_old(plan):
                self._wait()
            elif self._rounds is not None and self._round >= self._rounds:
                if self._fetch_last(plan, self._rounds) and self._make_durable(plan, self._owners(), self._rounds):
                    return None
            elif not self._ranks:
                self._watch(plan)
            elif (rank := self._first(_Stage.COMPUTED)) is not None and self._may_push:
                self._push_round(rank)
            elif (rank := self._first(_Stage.COMPUTING)) is not None:
                self._look()
                if self.synced_term != NONE:
                    return self._take_turn(rank)
            elif not self._may_push:
                self._bring(self._round)
            else:
                self._end_round()
        return None

    def shards_ready(self, shards: list[int]) -> None:
        """The rank's own optimizer wants all of them."""

    def begin(self, rank_step: RankStep) -> None:
        self._rank_step = rank_step
        state = self._ranks[rank_step.rank]
        if state.done == 0:
            self._tools.journal.record("computing", term=self.synced_term, step=self._round, rank=rank_step.rank)
        self._flat_model.begin(self._gradients, keep_buffers=state.done > 0)

    def hand_over(self) -> None:
        """Make the rank's own step."""
        rank_step, rank = self._rank_step, self._ranks[self._rank_step.rank]
        factor = self._grad_factor()
        if factor is not None:
            for shard in self._trained:
                kernel, gradient = rank.kernels[shard.index], self._gradients.numbers(shard)
                kernel.apply(
                    [gradient], self._scratch, step=rank_step.step, opt_step=rank.memory.updates, grad_scale=factor
                )
            rank.memory.updates += 1
        self._tools.pool.release()
        self._flat_model.show_parameters()
        rank.done += 1
        self.version = rank_step.step + 1
        if rank.done == self._mode.round_steps:
            self._flat_model.collect_buffers()
            for shard in self._trained:
                parts = rank.memory.parts[shard.index]
                parts[LOCAL].copy_(parts.get(MASTER, self._model[shard.index]))
            if rank_step.rank == RANK_OF_BUFFERS:
                rank.buffers = [(s.index, self._model[s.index].clone()) for s in self._buffers]
            rank.stage = _Stage.COMPUTED

    # --- the life of a round

    def _first(self, stage: _Stage) -> int | None:
        return next((rank for rank, state in sorted(self._ranks.items()) if state.stage is stage), None)

    @property
    def _may_push(self) -> bool:
        """With overlap a movement goes on top of the version that the round before has made."""
        return not self._mode.overlap or self._have >= self._round

    def _take_turn(self, rank: int) -> RankStep:
        """The next step of this rank, with its parameters in the model."""
        state = self._ranks[rank]
        if state.done == 0:
            self._show(rank)
        self._gradients = self._tools.pool.take()
        return RankStep(self._round * self._mode.round_steps + state.done, rank)

    def _show(self, rank: int) -> None:
        for shard in self._trained:
            parts = self._ranks[rank].memory.parts[shard.index]
            self._model[shard.index].copy_(parts[LOCAL])
            if MASTER in parts:
                parts[MASTER].copy_(parts[LOCAL])
        self._show_buffers()

    def _show_buffers(self) -> None:
        for shard, value in self._round_buffers.items():
            self._model[shard].copy_(value)
        self._flat_model.version_arrived()

    def _keep_buffers(self) -> None:
        """Begin rounds with these buffers, whatever comes meanwhile."""
        self._round_buffers = {shard.index: self._global[shard.index].clone() for shard in self._buffers}

    def _refuse_late_buffers(self, state: _Rank) -> None:
        """With overlap buffers come a round late, but not after a resume."""
        if not self._mode.overlap or self._mode.forget:
            return
        if any(not torch.equal(value, self._round_buffers[shard]) for shard, value in state.buffers):
            raise UsageError(
                f"mode {self._mode}: this model changes its buffers (batch norm?), which with overlap could not be "
                "repeated after a death. Leave out overlap, or add forget."
            )

    def _grad_factor(self) -> float | None:
        """What to multiply the gradient by before it is applied; None to skip it.

        Raises:
            NonFiniteGradient: it holds NaN or Inf, and the job refuses such.
        """
        gradients = self._gradients
        flaw = next(filter(None, (gradients.flaw(shard) for shard in self._trained)), "")
        if flaw:
            if not self._tools.config.skip_nonfinite:
                self._flaw = flaw
                self._refuse_flaw()
            self._log.warning(
                "skipping a step with NaN or Inf gradients", step=self._rank_step.step, rank=self._rank_step.rank
            )
            return None
        if self._optimizer.clip_grad_norm is None:
            return 1.0
        return clip_factor([gradients.squared_norm(shard) for shard in self._trained], self._optimizer.clip_grad_norm)

    def _push_round(self, rank: int) -> None:
        """Push what this rank has moved in the shards whose turn it is, and what it carries, if that is due."""
        state = self._ranks[rank]
        due = self._state_is_due(self._round + 1)
        pushes: list[tuple[int, Tensor]] = []
        self._fingerprint = 0
        for shard in self._trained:
            payload = [self._movement(state, shard, rank)] if self._mode.exchanges(shard.index, self._round) else []
            if due and shard.index in self._states:
                payload.append(state.memory.pack(shard, self._states[shard.index]))
            if payload:
                pushes.append((shard.index, payload[0] if len(payload) == 1 else torch.cat(payload)))
        if rank == RANK_OF_BUFFERS:
            self._refuse_late_buffers(state)
            pushes += [(shard, value.view(torch.uint8)) for shard, value in state.buffers]
        state.pushed, state.pushed_step = pushes, self._round
        self._push_kept(rank)
        state.stage = _Stage.PUSHED
        self._record_pushed(self._round, rank)

    def _state_is_due(self, version: int) -> bool:
        """With the commits of that, and at the end, where every shard is pushed: the job may go on from there."""
        ends = version == self._rounds and self._mode.fragments == 1 and self._tools.config.keeps_rank_state
        return ends or self._tools.config.rank_state_is_due(version)

    def _movement(self, state: _Rank, shard: Shard, rank: int) -> Tensor:
        """What to push of a shard; with overlap, move on from there."""
        config, parts = self._tools.config, state.memory.parts[shard.index]
        moved = parts[START] - parts[LOCAL]
        if not torch.isfinite(moved).all():
            raise NonFiniteGradient(
                f"rank {rank} has left the range of numbers in round {self._round}, in "
                f"{self._tools.layout.tensor_at(shard, int((~torch.isfinite(moved)).nonzero()[0]))}. "
                "Lower the learning rate, or clip."
            )
        payload: Tensor
        if config.compression.applies_to(shard.dtype):
            payload = torch.empty(config.compression.payload_bytes(shard.numel), dtype=torch.uint8)
            stream = rounding_stream(config.seed, self._round, rank, shard.index)
            encode(config.compression, moved, payload, stream=stream, residual=parts.get(RESIDUAL))
        else:
            payload = moved.to(self._global[shard.index].dtype).view(torch.uint8)
        if self._tools.journal.enabled:
            self._fingerprint += self._fingerprint_of(shard.index, payload)
        if self._mode.overlap:
            parts[LOCAL].copy_(self._global[shard.index]).sub_(moved)
            parts[START].copy_(parts[LOCAL])
        return payload

    def _push_kept(self, rank: int) -> None:
        state = self._ranks[rank]
        flags = Flag.STATE if self._state_is_due(state.pushed_step + 1) else Flag.NONE
        for shard, payload in state.pushed:
            self._servers.push_value(self._plan, state.pushed_step, rank, shard, as_bytes(payload), flags)

    def _end_round(self) -> None:
        """All of ours are pushed: go on to the next round, with or without the version that this one makes."""
        if self._mode.overlap:
            self._keep_buffers()
        self._ask(self._round + 1)
        if not self._mode.overlap:
            if not self._bring(self._round + 1):
                return
            self._adopt(self._round)
        self._round += 1
        for state in self._ranks.values():
            state.stage, state.done = _Stage.COMPUTING, 0

    def _adopt(self, exchanged_in: int) -> None:
        """Continue from the global parameters in the shards that were exchanged in that round."""
        self._keep_buffers()
        for state in self._ranks.values():
            for shard in self._trained:
                if self._mode.exchanges(shard.index, exchanged_in):
                    parts = state.memory.parts[shard.index]
                    parts[LOCAL].copy_(self._global[shard.index])
                    parts[START].copy_(parts[LOCAL])

    # --- versions

    def _ask(self, version: int) -> None:
        """Have servers bring this version as it is made."""
        if self._asked != version:
            self._asked = version
            self._brought.clear()
            self._servers.wait_for(self._plan, self._owners(), version)

    def _bring(self, version: int) -> bool:
        """Have this version, which was asked for; False if there is something else to do before."""
        plan = self._plan
        return self._have == version or self._pump_until(
            lambda: self._have == version,
            lambda: self._term_is_over(plan) or self.synced_term == NONE,
            lambda: None,
        )

    def _look(self) -> None:
        """Receive what is there, and send what can be sent, between two steps."""
        try:
            self._pump(0.0)
        except Disconnected as error:
            self._out_of_sync(str(error))

    def _watch(self, plan: Plan) -> None:
        """We hold no rank: wait for another plan, or for the end."""
        if self._rounds is None:
            self._wait()
        elif self._make_durable(plan, self._owners(), self._rounds):
            self._round = self._rounds

    def _fetch_last(self, plan: Plan, version: int) -> bool:
        """Have what came of the last round in the model; False if there is something else to do before."""
        if self._have != version:
            if not self._pull(plan, version):
                return False
            self._have = version
        for shard in self._trained:
            self._model[shard.index].copy_(self._global[shard.index])
        self._keep_buffers()
        self._show_buffers()
        self.version = version * self._mode.round_steps
        return True

    def _pull(self, plan: Plan, version: int) -> bool:
        """Have all shards at this version, and frozen ones, if they are not here yet."""
        self._to_pull = {shard.index for shard in self._changing}
        frozen = () if self._frozen_loaded else self._tools.layout.shards_of(TensorRole.FROZEN)

        def ask() -> None:
            for index in list(self._to_pull):
                self._servers.pull(plan, index, version)
            for shard in frozen:
                self._to_pull.add(shard.index)
                self._servers.pull(plan, shard.index, 0)

        if not self._pump_until(lambda: not self._to_pull, lambda: self._term_is_over(plan), ask):
            return False
        self._frozen_loaded = True
        return True

    def _move(self, header: Header, payload: memoryview) -> None:
        """A version comes as what it adds to the one before, which we have."""
        if header.step > self._versions[header.shard]:
            moved = torch.empty_like(self._global[header.shard])
            decode(self._tools.config.compression, torch.frombuffer(payload, dtype=torch.uint8), moved)
            self._global[header.shard].add_(moved)
            self._versions[header.shard] = header.step

    # --- terms

    def _load(self, plan: Plan) -> bool:
        """Stand in a term: at its beginning, or where we were in it."""
        self._out_of_sync(f"term {plan.term}")
        if not self._connect(plan):
            return False
        self._plan = plan
        if plan.term != self._term:
            if not self._begin_term(plan):
                return False
            self._term = plan.term
            self._tools.journal.record("loaded", term=plan.term, version=plan.resume)
            failpoint("worker.loaded")
        self.synced_term = plan.term
        for rank in self._ranks:
            self._push_kept(rank)
        if self._asked > self._have:
            wanted, self._asked = self._asked, NONE
            self._ask(wanted)
        return True

    def _begin_term(self, plan: Plan) -> bool:
        """Take up our ranks where the term begins; False if the plan or a connection changed meanwhile."""
        self._term = NONE
        self._have = self._asked = NONE
        if not self._pull(plan, plan.resume):
            return False
        mine = self._held_in(plan)
        self._ranks = {rank: self._taken_up(rank) for rank in mine}
        self._round = self._have = plan.resume
        self.version = plan.resume * self._mode.round_steps
        self._keep_buffers()
        for version in range(plan.resume - self._mode.fragments, plan.resume):
            self._adopt(version)
        if not self._pull_states(plan, {rank: state.memory for rank, state in self._ranks.items()}):
            return False
        if not self._mode.overlap:
            self._adopt(plan.resume - 1)  # what was pushed with a round is older than what came of it
        return True

    def _taken_up(self, rank: int) -> _Rank:
        """A rank with the state that we have of it, where nobody keeps it, or with that of the beginning."""
        known = self._ranks.get(rank)
        memory = known.memory if known is not None and self._mode.forget else self._new_memory()
        kernels = {
            shard.index: ShardKernel(
                self._optimizer,
                self._tools.layout,
                shard,
                self._model[shard.index],
                {n: t for n, t in memory.parts[shard.index].items() if n not in (START, LOCAL, RESIDUAL)},
            )
            for shard in self._trained
        }
        return _Rank(memory, kernels)

    def _new_memory(self) -> RankMemory:
        parts: dict[int, dict[str, Tensor]] = {}
        for shard in self._trained:
            slots = init_slots(self._optimizer, self._model[shard.index], shard, self._tools.layout)
            exact = slots.get(MASTER, self._model[shard.index])
            parts[shard.index] = {**slots, START: torch.empty_like(exact), LOCAL: torch.empty_like(exact)}
            if self._tools.config.compression.needs_residual:
                parts[shard.index][RESIDUAL] = torch.zeros(shard.numel)
        return RankMemory(parts)

    # --- servers

    def place(self, header: Header, shard: Shard) -> memoryview:
        if header.flags & Flag.MOVEMENT and self._tools.config.publishes_movements:
            return memoryview(bytearray(self._tools.config.compression.payload_bytes(shard.numel)))
        if shard.role is TensorRole.FROZEN or header.flags & Flag.MOVEMENT:
            return super().place(header, shard)
        return as_bytes(self._global[shard.index])

    def _take(self, answer: Answer) -> None:
        header = answer.header
        match header.kind:
            case Kind.PARAMS if header.flags & Flag.MOVEMENT:
                self._move(header, answer.payload)
            case Kind.PARAMS:
                self._to_pull.discard(header.shard)
                self._versions[header.shard] = header.step
            case Kind.VERSION if header.step == self._asked:
                self._brought.add(answer.server)
                if self._brought >= self._owners():
                    self._have = self._asked
                    self._tools.journal.record("acked", term=self.synced_term, version=self._have)
                    for state in self._ranks.values():
                        if state.pushed_step < self._have:
                            state.pushed = []
            case Kind.STATE:
                self._take_state(answer)
            case Kind.DURABLE:
                self._durable.add(answer.server)
            case Kind.REFUSED:
                self._on_refusal(header, answer.text)
                self.synced_term = NONE
            case _:
                pass
