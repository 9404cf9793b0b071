"""The course on arrival (async, ssp): each rank goes on by itself, and keeps what it pushed until that is durable.

A rank's pushes are numbered. What the servers have not yet committed is kept and, when a term begins again from an
older commit, pushed again: servers drop what they have. A push is *durable* once all servers have committed a version
that contains it; that is its acknowledgement. If a worker dies with pushes that were not, they may be lost, and whoever
gets the rank computes these steps again: each counts once in the end, either way.

A rank may have :attr:`~psa_store.job.config.JobConfig.window` pushes that are not durable; then it waits.

User code sees each shard whole, but not all shards after the same pushes: that is the nature of these modes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_store.cluster import Plan
from psa_store.job.layout import Shard, TensorRole
from psa_store.optim import from_dict
from psa_store.optim.reduce import clip_factor
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Kind
from psa_store.worker.batches import RankStep
from psa_store.worker.gradients import GradientMemory
from psa_store.worker.server_connections import Answer
from psa_store.worker.strategy.base import NONE, Strategy, Tools

_PATIENCE_S = 0.2
"""How long one rank is waited for before another of ours is tried."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A push that may have to be made again.

    ``gradients``: None if all of it is in ``payloads``, which are by shard. ``buffers``: the values of buffer shards
    after this step.
    """

    step: int
    gradients: GradientMemory | None
    payloads: Mapping[int, Tensor]
    finite: bool
    buffers: Mapping[int, bytes]


class AsyncStrategy(Strategy):
    """See the module."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._clip = from_dict(tools.config.optimizer).clip_grad_norm
        self._waits_for_whole = self._clip is not None or tools.config.skip_nonfinite
        self._trained = tools.layout.shards_of(TensorRole.TRAINED)
        self._clocks: dict[int, int] = {}
        """By rank of ours, the step that comes next."""
        self._kept: dict[int, deque[Kept]] = {}
        self._again: dict[int, deque[Kept]] = {}
        """What is to be pushed again, one after the other: each when the servers have the one before."""
        self._applied: dict[str, Sequence[int]] = {}
        """By server, how many pushes of each rank it has, as it said since we asked."""
        self._committed: dict[str, dict[int, Sequence[int]]] = {}
        """By server and version that it has committed, how many pushes of each rank are in it."""
        self._brought: set[str] = set()
        self._awaited: tuple[int, int] | None = None
        self._to_pull: set[int] = set()
        """Shards that were asked for and are not here yet."""
        self._frozen_loaded = False
        self._finite = True
        self._sent: dict[int, Tensor] = {}
        """The encodings of this push that have been sent."""
        self._told_cut = NONE, ""
        """Term and barrier of the checkpoint of which the servers were told, on these connections."""
        self._cut_at: tuple[str, dict[int, int]] | None = None
        """Its barrier, and by rank of ours how many pushes belong to it: the same on all connections."""
        self._residuals: dict[int, dict[int, Tensor]] = {}
        """By rank and shard, what it has held back."""

    # --- what the worker calls

    def next_rank_step(self) -> RankStep | None:
        steps, ranks = self._tools.steps, self._tools.config.ranks
        while not self._told_to_leave:
            known = self._tools.membership.standing.plan
            plan = None if known is None or self._plan_is_old(known) else self._settle()
            if plan is None:
                self._wait()
                continue
            if not self._know_our_ranks(plan):
                continue
            self._tell_cut(plan)
            todo = [
                rank for rank in self._holding() if self._again[rank] or steps is None or self._clocks[rank] < steps
            ]
            if todo:
                rank_step = self._next_of(todo)
                if rank_step is not None:
                    return rank_step
            elif steps is None:
                self._wait()
            elif self._fetch_last(plan, steps) and self._make_durable(plan, self._owners(), steps * ranks):
                return None
        return None

    def _next_of(self, todo: Sequence[int]) -> RankStep | None:
        """The next step of one of these ranks, after what it has to push again; None if all of them must wait.

        Each is asked for in turn, the one that is behind first: what a rank waits for may be the push of another of
        ours, which a shard needs for its next commit.
        """
        for rank in sorted(todo, key=lambda each: (self._comes(each), each)):
            blocked = not self._again[rank] and len(self._kept[rank]) >= self._tools.config.window
            if blocked or not self._bring(rank, self._comes(rank)):
                continue
            if self._again[rank]:
                self._push_again(rank, self._again[rank].popleft())
                return None  # look at everything again
            self._gradients = self._tools.pool.take()
            return RankStep(self._clocks[rank], rank)
        if all(len(self._kept[rank]) >= self._tools.config.window for rank in todo):
            self._wait()
        return None

    def _comes(self, rank: int) -> int:
        """The step that a rank pushes next."""
        return self._again[rank][0].step if self._again[rank] else self._clocks[rank]

    def begin(self, rank_step: RankStep) -> None:
        super().begin(rank_step)
        self._finite = True
        self._sent = {}

    def shards_ready(self, shards: list[int]) -> None:
        """Start pushing them, unless something must be known of the whole gradient before."""
        if not self._waits_for_whole:
            self._push(shards)

    def hand_over(self) -> None:
        if self._waits_for_whole:
            self._push_whole()
        self._refuse_flaw()
        rank_step = self._rank_step
        self._flat_model.collect_buffers()
        buffers = {
            shard.index: bytes(self._flat_model.parameters(shard))
            for shard in self._tools.layout.shards_of(TensorRole.BUFFER)
        }
        self._push_buffers(rank_step.step, rank_step.rank, buffers)
        whole = len(self._sent) == len(self._trained)
        if whole:
            self._tools.pool.put_back(self._gradients, read=False)
        gradients = None if whole else self._gradients
        self._kept[rank_step.rank].append(Kept(rank_step.step, gradients, self._sent, self._finite, buffers))
        self._record_pushed(rank_step.step, rank_step.rank)
        self._clocks[rank_step.rank] = self.version = rank_step.step + 1

    # --- pushing

    def _push_whole(self) -> None:
        """Clip the gradient by its global norm, or have all servers skip it if it is not finite."""
        gradients = self._gradients
        if self._tools.config.skip_nonfinite:
            self._finite = not any(gradients.flaw(shard) for shard in self._trained)
        if self._finite and self._clip is not None:
            factor = clip_factor([gradients.squared_norm(shard) for shard in self._trained], self._clip)
            if factor < 1.0:
                gradients.scale(self._trained, factor)
        self._push([shard.index for shard in self._trained], finite=self._finite)

    def _payloads(self, shards: Iterable[int]) -> Mapping[int, Tensor]:
        """Remembered, since what holds something back cannot be encoded a second time."""
        payloads = super()._payloads(shards)
        self._sent.update(payloads)
        return payloads

    def _residual(self, rank: int, shard: Shard) -> Tensor | None:
        if not self._tools.config.compression.needs_residual:
            return None
        own = self._residuals.setdefault(rank, {})
        if shard.index not in own:
            own[shard.index] = torch.zeros(shard.numel)
        return own[shard.index]

    def _push_buffers(self, step: int, rank: int, buffers: Mapping[int, bytes]) -> None:
        for shard, value in buffers.items():
            self._servers.push_value(self._plan, step, rank, shard, memoryview(value))

    def _push_again(self, rank: int, kept: Kept) -> None:
        shards = [shard.index for shard in self._trained]
        self._send(RankStep(kept.step, rank), shards, kept.gradients, kept.payloads, finite=kept.finite)
        self._push_buffers(kept.step, rank, kept.buffers)

    # --- checkpoints

    def _must_cut(self) -> bool:
        """Whether a checkpoint is asked for that we have not told the servers of, on these connections."""
        plan = self._tools.membership.standing.plan
        return plan is not None and plan.cut is not None and self._told_cut != (plan.term, plan.cut.barrier)

    def _tell_cut(self, plan: Plan) -> None:
        """Before any push that comes behind it, tell where the cut is in each of our ranks: here."""
        cut = plan.cut
        if cut is None or self._told_cut == (plan.term, cut.barrier):
            return
        if self._cut_at is None or self._cut_at[0] != cut.barrier:
            self._cut_at = cut.barrier, {rank: self._clocks[rank] for rank in self._holding()}
        for rank, clock in self._cut_at[1].items():
            self._servers.cut(plan, self._owners(), cut, rank, clock)
        self._told_cut = plan.term, cut.barrier

    # --- where our ranks stand

    def _know_our_ranks(self, plan: Plan) -> bool:
        """Have the clocks of all ranks that the plan gives us; False if there is something else to do before."""
        ours = set(self._holding())
        for rank in self._clocks.keys() - ours:
            self._forget(rank)
        new = ours - self._clocks.keys()
        if new and not self._ask(plan):
            return False
        for rank in new:
            self._start(rank, self._applied_everywhere(rank))
        return True

    def _start(self, rank: int, step: int) -> None:
        """A rank is ours from this step on."""
        self._clocks[rank] = step
        self._kept[rank] = deque()
        self._again[rank] = deque()

    def _forget(self, rank: int) -> None:
        """The rank is another's now, and so is the care for its pushes."""
        del self._clocks[rank], self._again[rank]
        self._residuals.pop(rank, None)
        for kept in self._kept.pop(rank):
            if kept.gradients is not None:
                self._tools.pool.put_back(kept.gradients, read=True)

    def _applied_everywhere(self, rank: int) -> int:
        return min((clocks[rank] for clocks in self._applied.values()), default=0)

    def _ask(self, plan: Plan) -> bool:
        """Ask all servers for their clocks; False if there is something else to do."""
        self._applied.clear()
        owners = self._owners()
        return self._pump_until(
            lambda: self._applied.keys() >= owners,
            lambda: self._term_is_over(plan),
            lambda: self._servers.ask_clocks(plan, owners),
        )

    def _load(self, plan: Plan) -> bool:
        """Find out what the servers have of our ranks' pushes, and push again what they lack."""
        self._out_of_sync(f"term {plan.term}")
        if not self._connect(plan):
            return False
        self._plan = plan
        self._committed.clear()
        if not self._frozen_loaded:
            self._to_pull = {shard.index for shard in self._tools.layout.shards_of(TensorRole.FROZEN)}
            if not self._pull(plan, 0):
                return False
            self._frozen_loaded = True
        if not self._ask(plan):
            return False
        self.synced_term = plan.term
        self._tools.journal.record("loaded", term=plan.term, version=plan.resume)
        failpoint("worker.loaded")
        for rank in list(self._clocks):
            if rank in self._holding():
                self._take_up(rank, self._applied_everywhere(rank))
            else:
                self._forget(rank)
        return True

    def _take_up(self, rank: int, start: int) -> None:
        """Go on with a rank of which the servers have the pushes below ``start``."""
        kept = self._kept[rank]
        whole = start == self._clocks[rank] or (len(kept) > 0 and kept[0].step <= start < self._clocks[rank])
        if not whole:
            # Others held the rank meanwhile, so we do not have what they pushed: compute these steps again.
            self._forget(rank)
            self._start(rank, start)
            return
        again = self._again[rank] = deque(each for each in kept if each.step >= start)
        if again:
            self._log.info("pushing again", rank=rank, first=start, pushes=len(again))
            self._tools.journal.record("replayed", term=self.synced_term, rank=rank, first=start, pushes=len(again))

    # --- parameters

    def _bring(self, rank: int, step: int) -> bool:
        """Have the parameters with which ``rank`` starts a step; False if there is something else to do, or to try."""
        plan, owners, ours = self._plan, self._owners(), self._holding()
        give_up_s = time.monotonic() + _PATIENCE_S
        self._awaited = rank, step
        self._brought.clear()
        brought = self._pump_until(
            lambda: self._brought >= owners,
            lambda: (
                self._term_is_over(plan)
                or self._holding() != ours
                or self.synced_term == NONE
                or self._must_cut()  # a rank that others wait for may be waiting for this
                or (len(ours) > 1 and time.monotonic() > give_up_s)
            ),
            lambda: self._servers.wait_for(plan, owners, step, rank),
        )
        if brought:
            self._flat_model.version_arrived()
            self.version = step
        return brought

    def _fetch_last(self, plan: Plan, steps: int) -> bool:
        """Wait for the last push of all ranks, and have what came of it; False if there is something else to do."""
        self._to_pull = {shard.index for shard in self._tools.layout.versioned}
        if not self._pull(plan, steps * self._tools.config.ranks):
            return False
        self._flat_model.version_arrived()
        self.version = steps
        return True

    def _pull(self, plan: Plan, version: int) -> bool:
        """Have the shards of ``_to_pull``, at this version; False if the plan or a connection changed meanwhile."""

        def ask() -> None:
            for shard in self._to_pull:
                self._servers.pull(plan, shard, version)

        return self._pump_until(lambda: not self._to_pull, lambda: self._plan_changed(plan), ask)

    def _out_of_sync(self, why: str) -> None:
        super()._out_of_sync(why)
        self._awaited = None
        self._told_cut = NONE, ""

    def _take(self, answer: Answer) -> None:
        header = answer.header
        match header.kind:
            case Kind.PARAMS:
                self._to_pull.discard(header.shard)
            case Kind.VERSION:
                if (header.rank, header.step) == self._awaited:
                    self._brought.add(answer.server)
            case Kind.CLOCKS if header.term != self._plan.term:
                pass  # of a term that is over: what it says of commits may have been undone
            case Kind.CLOCKS:
                ranks = self._tools.config.ranks
                self._applied[answer.server] = answer.clocks[:ranks]
                self._committed.setdefault(answer.server, {})[header.step] = answer.clocks[ranks:]
                self._drop_durable()
            case Kind.DURABLE:
                self._durable.add(answer.server)
            case Kind.REFUSED:
                self._on_refusal(header, answer.text)
                self.synced_term = NONE  # it was a push, perhaps: compare what we have and what they have
            case _:
                pass

    def _drop_durable(self) -> None:
        """Keep no longer what all servers have committed."""
        owners = self._owners()
        if not self._committed.keys() >= owners:
            return
        common = set.intersection(*(set(self._committed[server]) for server in owners))
        if not common:
            return
        version = max(common)
        for server in owners:
            self._committed[server] = {v: c for v, c in self._committed[server].items() if v >= version}
        for rank, kept in self._kept.items():
            durable = min(self._committed[server][version][rank] for server in owners)
            while kept and kept[0].step < durable:
                done = kept.popleft()
                if done.gradients is not None:
                    self._tools.pool.put_back(done.gradients, read=False)
                self._tools.journal.record("settled", term=self.synced_term, rank=rank, step=done.step)
