"""The synchronous course: all ranks' gradients of a version, then the next version, for all shards alike.

The loop that matters is :meth:`SyncStrategy.next_rank_step`: look at the plan, have the parameters of its term, and
find a rank of ours that has not pushed its gradient for the present version. Every disturbance (a new term, a lost
connection, a rank more or less) only changes what that loop finds the next time.

With speculation, who waits for longer than half of its own step asks which ranks are missing. The holder of the next
rank after a missing one computes that, too: the model still has the version, since parameters come by value, and only
once the step is complete.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from psa_store.cluster import Plan
from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.errors import Disconnected
from psa_store.job.layout import Shard, TensorRole
from psa_store.optim.rank_state import RESIDUAL
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Flag, Header, Kind
from psa_store.worker.batches import RankStep
from psa_store.worker.rank_memory import RankMemory
from psa_store.worker.server_connections import Answer
from psa_store.worker.strategy.base import NONE, WAIT_S, Strategy, Tools

_NEVER = 1 << 62
"""A version that no job reaches: waiting for it is waiting for something else."""
_PATIENCE = 0.5
"""Parts of our own step's time after which a missing rank counts as slow."""
_ASK_AGAIN_S = 0.02
"""How often who waits with speculation looks at that time, and asks again which ranks are missing."""


class SyncStrategy(Strategy):
    """See the module."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._pushed: set[int] = set()
        self._awaited = NONE
        self._brought: dict[str, int] = {}
        """The version that each server has brought since we wait for one."""
        self._arrived: dict[int, int] = {}
        """The version in which each shard has arrived since we began to load."""
        self._frozen_loaded = False
        self._overwritten = False
        """Whether parameters of a newer version have begun to come into the model."""
        self._speculates = tools.config.mode.speculate
        self._clocks: dict[str, Sequence[int]] = {}
        """By server, how many steps of each rank it has, as it said since we asked."""
        self._help: RankStep | None = None
        """A rank of somebody else that we compute next."""
        self._helped: set[int] = set()
        """Those that we have computed of the present version."""
        self._carried: dict[int, RankMemory] = {}
        """By rank of ours, what it carries at the present version ..."""
        self._carried_next: dict[int, RankMemory] = {}
        """... and what it will carry at the next: until that is here, a step may have to be made again."""
        self._carried_since = NONE
        """The term in which that began."""
        self._begun_s = 0.0
        self._took_s = 0.0
        """How long our last step took."""

    # --- what the worker calls

    def next_rank_step(self) -> RankStep | None:
        steps = self._tools.steps
        while not self._told_to_leave:
            plan = self._settle()
            if plan is None:
                self._wait()
            elif steps is not None and self.version >= steps:
                if self._make_durable(plan, [server.id for server in plan.servers], self.version):
                    return None
            elif self._plan_is_old(plan):
                self._wait()
            elif todo := [rank for rank in self._held_in(plan) if rank not in self._pushed]:
                if self._awaited != NONE:
                    # We told the servers that we have done with this version, so it may change where the model has it.
                    self._out_of_sync("more ranks came in the middle of a step")
                elif self._take_gradient_memory():
                    return RankStep(self.version, todo[0])
            elif self._help is not None:
                rank_step, self._help = self._help, None
                if self._take_gradient_memory() and not self._overwritten and rank_step.step == self.version:
                    return rank_step
            elif self._holding():
                self._await(self.version + 1)
            else:
                self._await(steps if steps is not None else _NEVER)
        return None

    def begin(self, rank_step: RankStep) -> None:
        super().begin(rank_step)
        self._begun_s = time.monotonic()

    def shards_ready(self, shards: list[int]) -> None:
        """Start pushing them."""
        self._push(shards)

    def hand_over(self) -> None:
        """With the gradient that is the step's last, wait for the next version and load it."""
        self._refuse_flaw()
        rank_step = self._rank_step
        self._took_s = time.monotonic() - self._begun_s
        if rank_step.rank == RANK_OF_BUFFERS or self._tools.config.mode.backup > 0:
            self._flat_model.collect_buffers()
            for shard in self._tools.layout.shards_of(TensorRole.BUFFER):
                self._servers.push_value(
                    self._plan, rank_step.step, rank_step.rank, shard.index, self._flat_model.parameters(shard)
                )
        self._record_pushed(rank_step.step, rank_step.rank)
        self._pushed.add(rank_step.rank)
        if self._pushed.issuperset(self._holding()):
            self._await(self.version + 1)
        # A term may have ended in the middle of the new version: user code must not see a mixture.
        while self.synced_term == NONE and not self._told_to_leave:
            if self._settle() is None:
                self._wait()

    # --- what ranks carry

    def _residual(self, rank: int, shard: Shard) -> Tensor | None:
        if rank not in self._carried:
            return None
        place = self._carried_next[rank].parts[shard.index][RESIDUAL]
        return place.copy_(self._carried[rank].parts[shard.index][RESIDUAL])

    def _with_state(self, rank_step: RankStep, payloads: Mapping[int, Tensor]) -> tuple[Flag, Mapping[int, Tensor]]:
        version = rank_step.step + 1
        due = self._tools.config.rank_state_is_due(version) or version == self._tools.steps
        if not self._states or not due:
            return Flag.NONE, payloads
        memory, shards = self._carried_next[rank_step.rank], self._tools.layout.shards
        return Flag.STATE, {
            i: torch.cat([payload, memory.pack(shards[i], self._states[i])]) for i, payload in payloads.items()
        }

    def _take_up(self, plan: Plan) -> bool:
        """Have what our ranks carry where the term begins; False if something came in between."""
        if not self._states or self._carried_since == plan.term:
            return True
        mine = self._held_in(plan)
        self._carried = {rank: self._new_memory() for rank in mine}
        self._carried_next = {rank: self._new_memory() for rank in mine}
        if not self._pull_states(plan, self._carried):
            return False
        self._carried_since = plan.term
        return True

    def _new_memory(self) -> RankMemory:
        return RankMemory({i: {RESIDUAL: torch.zeros(state.numel)} for i, state in self._states.items()})

    # --- waiting for a version

    def _disturbed(self) -> bool:
        """Whether there is something else to do than to wait for the present step."""
        standing = self._tools.membership.standing
        if standing.plan is None or standing.plan.term != self.synced_term:
            self.synced_term = NONE
            return True
        self._plan = standing.plan
        return self._told_to_leave or not self._pushed.issuperset(self._holding())

    def _await(self, version: int) -> None:
        """Wait until the model has ``version``, or a newer one, where a step may be complete without our ranks.

        Comes back early when there is something else to do.
        """
        idle = not self._holding()
        slow_at_s = time.monotonic() + _PATIENCE * self._took_s
        try:
            owners = self._owners()
            if self._awaited != version:
                self._awaited = version
                self._brought = {}
                self._overwritten = False
                self._servers.wait_for(self._plan, owners, version)
            while not self._disturbed():
                if len(self._brought) == len(owners):
                    newest = max(self._brought.values())
                    behind = [server for server, brought in self._brought.items() if brought < newest]
                    if newest != version and not self._tools.config.mode.may_miss_versions:
                        self.synced_term = NONE  # the job went on without us while our ranks were with others
                        return
                    if not behind:
                        self._tools.journal.record("acked", term=self.synced_term, version=newest)
                        self._version_arrived(newest)
                        return
                    for server in behind:
                        del self._brought[server]
                    self._servers.wait_for(self._plan, behind, newest)
                if self._speculates and not idle and time.monotonic() >= slow_at_s and self._found_to_help():
                    return
                self._pump(_ASK_AGAIN_S if self._speculates else WAIT_S)
        except Disconnected as error:
            self._out_of_sync(str(error))
        if idle:
            self.synced_term = NONE  # we watched from the side: the model is not at the present version

    def _found_to_help(self) -> bool:
        """Look for a rank that all wait for and that is ours to help with; asks servers which are missing."""
        owners = self._owners()
        if self._overwritten or self._help is not None:
            return False
        if not self._clocks.keys() >= owners:
            self._servers.ask_clocks(self._plan, owners - self._clocks.keys())
            return False
        clocks = [min(each) for each in zip(*self._clocks.values(), strict=True)]
        self._clocks = {}
        rank = rank_to_help(clocks, self.version, self._holding(), self._helped)
        if rank is None:
            return False
        self._log.debug("computing the rank of a slow worker", step=self.version, rank=rank)
        self._tools.journal.record("speculated", term=self.synced_term, step=self.version, rank=rank)
        self._helped.add(rank)
        self._help = RankStep(self.version, rank)
        return True

    def _version_arrived(self, version: int) -> None:
        if version == self.version + 1:
            self._carried, self._carried_next = self._carried_next, self._carried
        self.version = version
        self._helped.clear()
        self._help = None
        self._clocks = {}
        self._pushed.clear()
        self._awaited = NONE
        self._tools.pool.release()
        self._flat_model.version_arrived()

    def _take_gradient_memory(self) -> bool:
        """Have memory that nobody reads for the next gradient; False if something came in between.

        Where servers read gradients in place, each rank of a step needs its own. Where they are sent, one is enough,
        once it has left.
        """
        try:
            while not self._servers.shares and self._servers.sending:
                self._pump()
                if self._tools.membership.standing.plan is not self._plan or self._told_to_leave:
                    return False
        except Disconnected as error:
            self._out_of_sync(str(error))
        if self.synced_term == NONE:
            return False
        if not self._servers.shares:
            self._tools.pool.release()
        self._gradients = self._tools.pool.take()
        return True

    # --- loading

    def _load(self, plan: Plan) -> bool:
        """Get all shards at one version of this term."""
        self._out_of_sync(f"term {plan.term}")
        if not self._connect(plan):
            return False
        self._plan = plan
        layout = self._tools.layout
        versioned = [shard.index for shard in layout.versioned]
        wanted = dict.fromkeys(versioned, plan.resume)
        if not self._frozen_loaded:
            wanted |= {shard.index: 0 for shard in layout.shards_of(TensorRole.FROZEN)}
        newest = plan.resume
        try:
            while wanted:
                for shard, at_least in wanted.items():
                    self._arrived.pop(shard, None)
                    self._servers.pull(plan, shard, at_least)
                while any(shard not in self._arrived for shard in wanted):
                    if self._term_is_over(plan):
                        return False
                    self._pump()
                # A step may complete while we read: then some shards are a version ahead of others.
                newest = max((self._arrived[shard] for shard in versioned), default=newest)
                wanted = {shard: newest for shard in versioned if self._arrived[shard] < newest}
        except Disconnected as error:
            self._out_of_sync(str(error))
            return False
        self._frozen_loaded = True
        if self._states and self._carried_since != plan.term:
            self.version = newest  # whatever we had been at, what our ranks carry is what comes now
        if not self._take_up(plan):
            return False
        self.synced_term = plan.term
        self._tools.journal.record("loaded", term=plan.term, version=newest)
        failpoint("worker.loaded")
        self._version_arrived(newest)
        return True

    def place(self, header: Header, shard: Shard) -> memoryview:
        self._overwritten = True
        return super().place(header, shard)

    def _out_of_sync(self, why: str) -> None:
        self._help = None
        self._clocks = {}
        self._tools.pool.give_up()
        super()._out_of_sync(why)
        self._awaited = NONE
        self._arrived = {}
        self._pushed.clear()

    def _take(self, answer: Answer) -> None:
        header = answer.header
        match header.kind:
            case Kind.PARAMS:
                self._arrived[header.shard] = header.step
            case Kind.VERSION:
                self._brought[answer.server] = header.step
                if answer.descriptor is not None:
                    self._flat_model.show(answer.server, answer.descriptor, self._trained_shards_of(answer.server))
            case Kind.STATE:
                self._take_state(answer)
            case Kind.CLOCKS:
                self._clocks[answer.server] = answer.clocks[: self._tools.config.ranks]
            case Kind.DURABLE:
                self._durable.add(answer.server)
            case Kind.REFUSED:
                self._on_refusal(header, answer.text)
                if header.step == self.version:
                    self._pushed.discard(header.rank)
            case _:
                pass

    def _trained_shards_of(self, server: str) -> list[int]:
        layout = self._tools.layout
        return [i for i in self._plan.shards_of(server) if layout.shards[i].role is TensorRole.TRAINED]


def rank_to_help(clocks: Sequence[int], version: int, holding: Collection[int], helped: Collection[int]) -> int | None:
    """Which missing rank a worker computes that holds these: one after whose place comes a rank of ours that is not
    missing, with only missing ones in between. So two workers do not compute the same.

    Args:
        clocks: by rank, how many of its steps servers have.
        helped: ranks that this worker has computed already.
    """
    ranks = len(clocks)
    for missing in (rank for rank in range(ranks) if clocks[rank] <= version and rank not in helped):
        helper = next((after for i in range(1, ranks) if clocks[after := (missing + i) % ranks] > version), None)
        if helper in holding:
            return missing
    return None
