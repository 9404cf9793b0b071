"""The strategy on arrival (async, ssp): each rank goes on by itself, and keeps what it pushed until that is durable.

Which rank is next, and what is kept and pushed again, decides
:class:`psa_store.consistency.worker_pushes.WorkerPushes`; :meth:`AsyncStrategy.next_rank_step` is the loop that
executes it.

A rank may have :attr:`~psa_store.job.config.JobConfig.window` pushes that are not durable; then it waits.

User code sees each shard whole, but not all shards after the same pushes: that is the nature of these modes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_store import logs
from psa_store.cluster import Plan
from psa_store.consistency.worker_instructions import AskClocks, Compute, Finish, Listen
from psa_store.consistency.worker_pushes import Bring, Drop, Forget, PushAgain, WorkerPushes
from psa_store.job.layout import Shard, TensorRole
from psa_store.observe.formatting import names
from psa_store.optim.note import GradientNote
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Header, Kind
from psa_store.worker.batches import RankStep
from psa_store.worker.flat_model import FlatModel
from psa_store.worker.gradients import GradientMemory, GradientPool
from psa_store.worker.pushing import GradientPush, refuse
from psa_store.worker.server_connections import Answer
from psa_store.worker.session import PlanSession, Tools
from psa_store.worker.strategy.base import place_parameters

_PATIENCE_S = 0.2
"""How long one rank is waited for before another one is tried."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A push that may have to be made again.

    ``gradients``: None if all of it is in ``payloads``, which are by shard. ``buffers``: the values of buffer shards
    after this step.
    """

    gradients: GradientMemory | None
    payloads: Mapping[int, Tensor]
    note: GradientNote
    finite: bool
    buffers: Mapping[int, bytes]


class AsyncStrategy:
    """See :class:`psa_store.worker.strategy.base.Strategy`, and the module."""

    def __init__(self, tools: Tools, model: FlatModel) -> None:
        self.session = PlanSession(tools, self)
        self.version = 0
        self._config = tools.config
        self._layout = tools.layout
        self._servers = tools.servers
        self._flat_model = model
        self._journal = tools.journal
        self._log = logs.get_logger()
        self._pool = GradientPool(tools.layout, tools.wire)
        self._push = GradientPush(tools, self.session, self._residual)
        self._trained = [shard.index for shard in tools.layout.shards_of(TensorRole.TRAINED)]
        self._buffers = tools.layout.shards_of(TensorRole.BUFFER)
        self._pushes = WorkerPushes(tools.steps, tools.config.window)
        self._kept: dict[tuple[int, int], Kept] = {}
        """By rank and step."""
        self._brought: set[str] = set()
        self._awaited: tuple[int, int] | None = None
        self._gradients: GradientMemory
        self._finite = True
        self._clip: float | None = None
        self._waits_for_whole = False
        self._told_cut: tuple[int, str] | None = None
        """Term and barrier of the checkpoint of which the servers were told, on these connections."""
        self._cut_at: tuple[str, dict[int, int]] | None = None
        """Its barrier, and by held rank how many pushes belong to it: the same on all connections."""
        self._residuals: dict[int, dict[int, Tensor]] = {}
        """By rank and shard, what it has held back."""

    # --- what the worker calls

    def next_rank_step(self) -> RankStep | None:
        session, pushes = self.session, self._pushes
        while not session.leaving:
            if not session.settle():
                session.wait()
                continue
            instruction = pushes.next()
            if isinstance(instruction, AskClocks):
                if self._ask_clocks(instruction.servers):
                    pushes.started()
                continue
            self._tell_cut()
            match instruction:
                case Bring(rank, step):
                    if self._bring(rank, step):
                        pushes.here(rank, step)
                    else:
                        pushes.not_here(rank)
                case PushAgain(rank, step):
                    self._push_again(RankStep(step, rank))
                    pushes.pushed(rank)
                case Compute(step, rank):
                    self._gradients = self._pool.take()
                    return RankStep(step, rank)
                case Finish(last):
                    version = last * self._config.ranks
                    if self._fetch_last(last, version) and session.finish(session.owners, version):
                        return None
                case Listen():
                    session.wait()
        return None

    def begin(self, rank_step: RankStep) -> None:
        self._finite = True
        self._push.begin(rank_step, self._gradients)
        self._push.computing()
        self._clip = self.session.history.at(rank_step.step).clip_grad_norm
        self._waits_for_whole = self._clip is not None or self._config.skip_nonfinite
        # Where something must be known of the whole gradient before, none of it is pushed until it is here.
        self._flat_model.begin(self._gradients, None if self._waits_for_whole else self._push.push)

    def hand_over(self) -> None:
        """Keep the push, too: it may have to be made again."""
        if self._waits_for_whole:
            self._push_whole()
        push, rank_step = self._push, self._push.rank_step
        if push.flaw:
            refuse(rank_step, push.flaw)
        self._flat_model.collect_buffers()
        buffers = {shard.index: self._flat_model.buffers_as_of_now(shard) for shard in self._buffers}
        self._push_buffers(rank_step, buffers)
        gradients: GradientMemory | None = self._gradients
        if len(push.payloads) == len(self._trained):
            self._pool.put_back(self._gradients, read=False)
            gradients = None
        self._kept[rank_step.rank, rank_step.step] = Kept(gradients, push.payloads, push.note, self._finite, buffers)
        push.done()
        self._pushes.pushed(rank_step.rank)
        self.version = rank_step.step + 1

    # --- pushing

    def _push_whole(self) -> None:
        """Clip the gradient by its global norm, or have all servers skip it if it is not finite."""
        gradients = self._gradients
        if self._config.skip_nonfinite:
            self._finite = not gradients.first_flaw()
        if self._finite and self._clip is not None:
            factor = gradients.clip_factor(self._clip)
            if factor < 1.0:
                for numbers in gradients.numbers.values():
                    numbers.mul_(factor)
        self._push.push(self._trained, finite=self._finite)

    def _residual(self, rank: int, shard: Shard) -> Tensor | None:
        if not self._config.compression.needs_residual:
            return None
        residuals = self._residuals.setdefault(rank, {})
        if shard.index not in residuals:
            residuals[shard.index] = torch.zeros(shard.numel)
        return residuals[shard.index]

    def _push_buffers(self, rank_step: RankStep, buffers: Mapping[int, bytes]) -> None:
        for shard, value in buffers.items():
            self._servers.push_value(rank_step.step, rank_step.rank, shard, memoryview(value))

    def _push_again(self, rank_step: RankStep) -> None:
        kept = self._kept[rank_step.rank, rank_step.step]
        self._push.send(rank_step, self._trained, kept.gradients, kept.payloads, kept.note, finite=kept.finite)
        self._push_buffers(rank_step, kept.buffers)

    # --- checkpoints

    @property
    def _must_cut(self) -> bool:
        """Whether a checkpoint is being taken of which the servers were not told, on these connections."""
        plan = self.session.newest.plan
        return plan is not None and plan.cut is not None and self._told_cut != (plan.term, plan.cut.barrier)

    def _tell_cut(self) -> None:
        """Before any push that comes behind it, tell where the cut is in each held rank: here."""
        plan, owners = self.session.plan, self.session.owners
        cut = plan.cut
        if cut is None or self._told_cut == (plan.term, cut.barrier):
            return
        if self._cut_at is None or self._cut_at[0] != cut.barrier:
            self._cut_at = cut.barrier, {rank: self._pushes.clocks[rank] for rank in self.session.held}
        for rank, clock in self._cut_at[1].items():
            self._servers.cut(owners, cut, rank, clock)
        self._told_cut = plan.term, cut.barrier

    # --- where the held ranks stand

    def _drop(self, what: Iterable[Drop | Forget]) -> None:
        """Keep no longer what need not be kept."""
        for each in what:
            match each:
                case Drop(rank, step, durable):
                    kept = self._kept.pop((rank, step))
                    if kept.gradients is not None:
                        self._pool.put_back(kept.gradients, read=not durable)
                    if durable:
                        self._journal.record("settled", term=self.session.plan.term, rank=rank, step=step)
                case Forget(rank):
                    self._residuals.pop(rank, None)

    def _ask_clocks(self, servers: Collection[str]) -> bool:
        """Ask servers for their clocks; False if there is something else to do."""
        self._pushes.asked()
        return self.session.ask(
            lambda: self._servers.ask_clocks(servers),
            lambda: self._pushes.all_told,
            self.session.term_is_over,
            lambda: f"{names(sorted(servers))} to say which pushes they have",
        )

    def load(self, plan: Plan) -> bool:
        """Find out what the servers have of these ranks' pushes, to push again what they lack."""
        self._pushes.ends_at(self.session.steps)
        self._pushes.term_begun(self.session.owners)
        if not self.session.pull((), 0, self.session.plan_is_over) or not self._ask_clocks(self.session.owners):
            return False
        self._journal.record("loaded", term=plan.term, version=plan.resume)
        failpoint("worker.loaded")
        self.replanned()
        self._drop(self._pushes.compared())
        for rank, steps in self._pushes.to_push_again().items():
            self._log.info("pushing again", rank=rank, first=steps[0], pushes=len(steps))
            self._journal.record("replayed", term=plan.term, rank=rank, first=steps[0], pushes=len(steps))
        return True

    def replanned(self) -> None:
        self._drop(self._pushes.planned(self.session.held))

    # --- parameters

    def _bring(self, rank: int, step: int) -> bool:
        """Have the parameters with which ``rank`` starts a step; False if there is something else to do, or to try."""
        session, held = self.session, self.session.held
        give_up_s = time.monotonic() + _PATIENCE_S
        self._awaited = rank, step
        self._brought.clear()
        brought = session.ask(
            lambda: self._servers.wait_for(session.owners, step, rank),
            lambda: self._brought >= session.owners,
            lambda: (
                session.term_is_over()
                or session.newest.held != held
                or session.term is None
                or self._must_cut  # a rank that others wait for may be waiting for this
                or (len(held) > 1 and time.monotonic() > give_up_s)
            ),
            lambda: f"parameters for step {step} of rank {rank} from {names(sorted(session.owners - self._brought))}",
        )
        if brought:
            self._flat_model.version_arrived()
            self.version = step
        return brought

    def _fetch_last(self, steps: int, version: int) -> bool:
        """Wait for the last push of all ranks, and have what came of it; False if there is something else to do."""
        if not self.session.pull(self._layout.versioned, version, self.session.plan_is_over):
            return False
        self._flat_model.version_arrived()
        self.version = steps
        return True

    @property
    def awaited(self) -> str:
        return f"{names(sorted(self.session.owners))} to make durable what was pushed" if self.session.held else ""

    def place(self, header: Header, shard: Shard) -> memoryview:
        return place_parameters(self._flat_model, header, shard)

    def lost(self) -> None:
        self._awaited = None
        self._told_cut = None
        self._pushes.lost()

    def refused(self, header: Header) -> None:
        """It was a push, perhaps: compare what this worker and the servers have."""
        self.session.compare_again()

    def take(self, answer: Answer) -> None:
        header = answer.header
        match header.kind:
            case Kind.PARAMS:
                self.session.arrived[header.shard] = header.step
            case Kind.VERSION:
                if (header.rank, header.step) == self._awaited:
                    self._brought.add(answer.server)
            case Kind.CLOCKS if header.term != self.session.plan.term:
                pass  # of a term that is over: what it says of commits may have been undone
            case Kind.CLOCKS:
                ranks = self._config.ranks
                applied, committed = answer.clocks[:ranks], answer.clocks[ranks:]
                self._drop(self._pushes.told(answer.server, header.step, applied, committed))
            case _:
                pass
