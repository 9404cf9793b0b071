"""What a worker asks of its job's mode: which rank's step comes next, and what becomes of its gradient.

``sync_course``, ``arrival_course`` and ``round_course`` are the three. A course lives as long as the worker, in the
thread that runs the model. It listens to servers only in :meth:`Strategy.next_rank_step` and
:meth:`Strategy.hand_over`, so the model cannot change under a running forward or backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from psa_store import logs
from psa_store.cluster import Plan
from psa_store.compression.codec import decode, encode
from psa_store.errors import Disconnected, NonFiniteGradient, Refused
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, Shard, TensorRole
from psa_store.job.sampling import rounding_stream
from psa_store.optim.rank_state import rank_state_of
from psa_store.optim.tensors import as_bytes
from psa_store.testing.failpoints import failpoint
from psa_store.testing.journal import Journal, fingerprint_text
from psa_store.wire import Flag, Header
from psa_store.worker.batches import RankStep
from psa_store.worker.flat_model import FlatModel
from psa_store.worker.gradients import GradientMemory, GradientPool
from psa_store.worker.membership import Membership
from psa_store.worker.rank_memory import RankMemory
from psa_store.worker.server_connections import Answer, Hello, ServerConnections, is_about_plan

WAIT_S = 0.5
"""How long one wait lasts at most before everything is looked at again; nothing depends on it but signals."""
_PUSH_SHARDS = 16
"""Shards that are checked and then pushed together, where many are ready at once: the first travel meanwhile."""
NONE = -1
"""No term, no version."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What belongs to the worker. ``leaving``: it was told to."""

    config: JobConfig
    layout: Layout
    steps: int | None
    model: FlatModel
    servers: ServerConnections
    membership: Membership
    pool: GradientPool
    journal: Journal
    leaving: Callable[[], bool]


class Strategy(ABC):
    """How this worker's ranks go on, step by step."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._servers = tools.servers
        self._flat_model = tools.model
        self._log = logs.get_logger()
        self.version = 0
        """Steps that the parameters in the model have behind them."""
        self.finished = False
        self.synced_term = NONE
        """Term in which we stand with the servers; NONE: what we have and what they have must be compared."""
        self._plan: Plan
        self._plan_needed = NONE
        self._gradients: GradientMemory
        self._rank_step: RankStep
        self._flaw = ""
        """A parameter whose gradient is not finite, in a job that does not skip such."""
        self._fingerprint = 0
        """Of the gradient that is being computed, for the journal."""
        self._durable: set[str] = set()
        states = {
            shard.index: rank_state_of(tools.config, shard) for shard in tools.layout.shards_of(TensorRole.TRAINED)
        }
        self._states = {shard: state for shard, state in states.items() if state is not None}
        """By shard, what servers keep of each rank."""
        self._states_to_pull: dict[tuple[int, int], RankMemory] = {}
        """By rank and shard, where what servers keep is to go."""

    # --- what the worker calls, in this order

    @abstractmethod
    def next_rank_step(self) -> RankStep | None:
        """The next (step, rank) to compute, with its parameters in the model; None: finished, or told to leave."""

    def begin(self, rank_step: RankStep) -> None:
        """Its batch is here."""
        self._rank_step = rank_step
        self._flaw = ""
        self._fingerprint = 0
        self._tools.journal.record("computing", term=self.synced_term, step=rank_step.step, rank=rank_step.rank)
        self._flat_model.begin(self._gradients)

    @abstractmethod
    def shards_ready(self, shards: list[int]) -> None:
        """The gradients of some shards are whole, in the middle of backward."""

    @abstractmethod
    def hand_over(self) -> None:
        """Backward is over.

        Raises:
            NonFiniteGradient: the gradient holds NaN or Inf and the job refuses such.
        """

    def place(self, header: Header, shard: Shard) -> memoryview:
        """Where a shard that comes by value is to be received."""
        if header.flags & Flag.MOVEMENT:
            raise Refused(f"a movement of shard {shard.index}, in a job that publishes none")
        return self._flat_model.place(shard)

    # --- for the courses: the plan

    @property
    def _told_to_leave(self) -> bool:
        return self._tools.leaving()

    def _holding(self) -> tuple[int, ...]:
        """The ranks that the plan gives us."""
        standing = self._tools.membership.standing
        return standing.plan.ranks_of(standing.member) if standing.plan else ()

    def _held_in(self, plan: Plan) -> tuple[int, ...]:
        """The ranks that this plan gives us; it may not be the newest."""
        return plan.ranks_of(self._tools.membership.standing.member)

    def _settle(self) -> Plan | None:
        """Follow the present plan and stand in its term; None if that is not possible yet."""
        plan = self._tools.membership.standing.plan
        if plan is None or not plan.owners:
            return None
        if self.synced_term == plan.term:
            self._plan = plan
            return plan
        return plan if self._load(plan) else None

    @abstractmethod
    def _load(self, plan: Plan) -> bool:
        """Begin a term, or the present one again; False if the plan or a connection changed meanwhile."""

    def _plan_is_old(self, plan: Plan) -> bool:
        """Whether somebody knows of a newer plan: a ZooKeeper server that is behind gave us this one."""
        if plan.revision >= self._plan_needed:
            return False
        self._tools.membership.refresh()
        return True

    def _term_is_over(self, plan: Plan) -> bool:
        now = self._tools.membership.standing.plan
        return now is None or now.term != plan.term or self._told_to_leave

    def _owners(self) -> set[str]:
        """The servers that own what changes."""
        return {self._plan.owner_of(shard.index).id for shard in self._tools.layout.versioned}

    # --- for the courses: servers

    def _connect(self, plan: Plan) -> bool:
        config, member = self._tools.config, self._tools.membership.standing.member
        return self._servers.connect(plan, Hello(config.name, self._tools.layout.fingerprint, member))

    def _out_of_sync(self, why: str) -> None:
        """What was in flight is unknown: connect and compare again. Servers recognise what they already have."""
        self._log.debug("connecting anew", why=why)
        self._servers.disconnect()
        self._flat_model.hide()
        self.synced_term = NONE

    def _wait(self) -> None:
        """Wait for news."""
        try:
            self._pump()
        except Disconnected as error:
            self._out_of_sync(str(error))

    def _pump(self, timeout_s: float = WAIT_S) -> None:
        for answer in self._servers.pump(timeout_s):
            self._take(answer)

    def _pump_until(self, done: Callable[[], bool], over: Callable[[], bool], ask: Callable[[], None]) -> bool:
        """Ask, and listen until it is done; False if it is over before, or a server is gone."""
        try:
            ask()
            while not done():
                if over():
                    return False
                self._pump()
        except Disconnected as error:
            self._out_of_sync(str(error))
            return False
        return True

    def _plan_changed(self, plan: Plan) -> bool:
        return self._tools.membership.standing.plan is not plan or self._told_to_leave

    @abstractmethod
    def _take(self, answer: Answer) -> None:
        """A server said something."""

    def _on_refusal(self, header: Header, text: str) -> None:
        if not is_about_plan(header.reason):
            raise Refused(f"a server refused this worker: {text}")
        self._plan_needed = max(self._plan_needed, header.revision)
        self._tools.membership.refresh()

    def _make_durable(self, plan: Plan, servers: Iterable[str], version: int) -> bool:
        """Wait until these servers have committed a version; False if there is something else to do before."""
        self._durable.clear()
        wanted = set(servers)
        self.finished = self._pump_until(
            lambda: self._durable >= wanted,
            lambda: self._plan_changed(plan),
            lambda: self._servers.finish(plan, wanted, version),
        )
        if not self.finished:
            return False
        self._tools.journal.record("finished", version=version)
        return True

    # --- for the courses: what ranks carry

    def _pull_states(self, plan: Plan, memories: Mapping[int, RankMemory]) -> bool:
        """Have in ``memories``, by rank, what servers keep where the term begins; False if it is over before.

        Nothing has been pushed for our ranks in this term, so servers still stand there.
        """
        self._states_to_pull = {(rank, shard): memory for rank, memory in memories.items() for shard in self._states}

        def ask() -> None:
            for rank, shard in self._states_to_pull:
                self._servers.pull_state(plan, shard, plan.resume, rank)

        return self._pump_until(lambda: not self._states_to_pull, lambda: self._term_is_over(plan), ask)

    def _take_state(self, answer: Answer) -> None:
        """STATE: of no length where a rank carries nothing yet."""
        shard = answer.header.shard
        memory = self._states_to_pull.pop((answer.header.rank, shard), None)
        if memory is not None and len(answer.payload):
            memory.unpack(self._tools.layout.shards[shard], self._states[shard], answer.payload)
        elif memory is not None and answer.header.step > 0:
            self._log.warning(
                "a rank begins anew what it carries: the job had ended between two commits of that",
                rank=answer.header.rank,
                shard=shard,
                version=answer.header.step,
            )

    # --- for the courses: gradients

    def _push(self, shards: list[int], *, finite: bool = True) -> None:
        """Check the gradients of some shards, unless they are known not to be finite, and push them."""
        layout, journal = self._tools.layout, self._tools.journal
        for start in range(0, len(shards), _PUSH_SHARDS):
            some = shards[start : start + _PUSH_SHARDS]
            flaws = [self._gradients.flaw(layout.shards[shard]) for shard in some] if finite else []
            flaw = next((each for each in flaws if each), "")
            if flaw and not self._tools.config.skip_nonfinite:
                self._flaw = self._flaw or flaw
                return
            payloads = self._payloads(some)
            if journal.enabled:
                self._fingerprint += sum(self._fingerprint_of(shard, payloads.get(shard)) for shard in some)
            self._send(self._rank_step, some, self._gradients, payloads, finite=finite and not flaw)
            failpoint("push.middle", some[-1])

    def _payloads(self, shards: Iterable[int]) -> Mapping[int, Tensor]:
        """The encodings of those shards that are compressed."""
        config, layout = self._tools.config, self._tools.layout
        payloads = {}
        for shard in (layout.shards[index] for index in shards):
            if config.compression.applies_to(shard.dtype):
                payload = torch.empty(config.compression.payload_bytes(shard.numel), dtype=torch.uint8)
                stream = rounding_stream(config.seed, self._rank_step.step, self._rank_step.rank, shard.index)
                residual = self._residual(self._rank_step.rank, shard)
                encode(config.compression, self._gradients.numbers(shard), payload, stream=stream, residual=residual)
                payloads[shard.index] = payload
        return payloads

    def _with_state(self, rank_step: RankStep, payloads: Mapping[int, Tensor]) -> tuple[Flag, Mapping[int, Tensor]]:
        """The payloads, each with what the rank will carry behind it where that is due, and the flag that says so."""
        return Flag.NONE, payloads

    def _residual(self, rank: int, shard: Shard) -> Tensor | None:
        """What ``rank`` has held back of this shard so far, where the compression holds something back."""
        return None

    def _fingerprint_of(self, index: int, payload: Tensor | None) -> int:
        """Of what the server will apply."""
        shard = self._tools.layout.shards[index]
        if payload is None:
            return self._gradients.fingerprint(shard)
        if not self._tools.config.compression.applies_to(shard.dtype):
            return xxh3_64_intdigest(as_bytes(payload), seed=index)
        decoded = torch.empty(shard.numel)
        decode(self._tools.config.compression, payload, decoded)
        return xxh3_64_intdigest(as_bytes(decoded), seed=index)

    def _send(
        self,
        rank_step: RankStep,
        shards: Sequence[int],
        gradients: GradientMemory | None,
        payloads: Mapping[int, Tensor],
        *,
        finite: bool,
    ) -> None:
        """Push what is compressed as ``payloads``, and the other shards as they are, from ``gradients``."""
        flags, payloads = self._with_state(rank_step, payloads)
        flags |= Flag.NONE if finite else Flag.NONFINITE
        for shard, payload in payloads.items():
            self._servers.push_value(self._plan, rank_step.step, rank_step.rank, shard, as_bytes(payload), flags)
        others = [shard for shard in shards if shard not in payloads]
        if others:
            assert gradients is not None
            self._servers.push(self._plan, rank_step.step, rank_step.rank, others, gradients, finite)

    def _refuse_flaw(self) -> None:
        if self._flaw:
            raise NonFiniteGradient(
                f"rank {self._rank_step.rank} computed NaN or Inf at step {self._rank_step.step} in the gradient of "
                f"{self._flaw}. Lower the learning rate, clip, or skip such steps (--skip-nonfinite on a new job)."
            )

    def _record_pushed(self, step: int, rank: int) -> None:
        self._tools.journal.record(
            "pushed",
            term=self.synced_term,
            step=step,
            rank=rank,
            sum=fingerprint_text(self._fingerprint),
        )
        failpoint("push.done")
