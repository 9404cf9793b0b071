"""The synchronous aggregator: the gradients of all ranks are collected, measured, and applied to all shards at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from psa_store import logs
from psa_store.cluster import NO_WORKER, Cell, Plan
from psa_store.consistency import Memory, SyncStep
from psa_store.consistency.instructions import (
    Applied,
    Apply,
    Event,
    Follow,
    Instruction,
    Measure,
    Measured,
    Move,
    Moved,
    NormsTold,
    Skip,
    TellNorms,
)
from psa_store.consistency.sync_step import Verdict
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.observe.formatting import cells, names, numbered
from psa_store.optim.history import OptimizerHistory
from psa_store.optim.note import PLAIN, GradientNote
from psa_store.optim.rank_state import rank_state_of
from psa_store.optim.reduce import clip_factor
from psa_store.server.aggregator.base import Aggregator, Tools
from psa_store.server.messages import Updated
from psa_store.server.shard import OwnedShard
from psa_store.server.waiters import Now
from psa_store.testing import failpoints
from psa_store.testing.failpoints import failpoint
from psa_store.testing.journal import fingerprint_text
from psa_store.wire import Connection, Header, Kind, SharedMemory


class SyncAggregator(Aggregator):
    """Carries out what :class:`~psa_store.consistency.SyncStep` decides."""

    def __init__(
        self, tools: Tools, plan: Plan, owned_shards: Mapping[int, OwnedShard], history: OptimizerHistory
    ) -> None:
        self._history = history
        config = tools.config
        roles = {i: owned.shard.role for i, owned in owned_shards.items()}
        self._exchanges_in_turn = config.mode.fragments > 1
        self._failpoints = failpoints.are_on()
        self._step = SyncStep(
            version=plan.resume,
            ranks=config.ranks,
            trained=[i for i, role in roles.items() if role is TensorRole.TRAINED],
            buffers=[i for i, role in roles.items() if role is TensorRole.BUFFER],
            all_shards=[shard.index for shard in tools.layout.versioned],
            needs_norms=history.clips,
            backup=config.mode.backup,
            # No method of this: in a cycle, the shards of a term that is over would keep their memory for long.
            pushed=partial(_is_pushed, config, tools.layout) if self._exchanges_in_turn else None,
            commit_every=config.commit_every,
        )
        super().__init__(tools, plan, owned_shards, self._step)
        self._changed = list(self.versioned.values())
        """The shards that the present version changed."""
        self._log = logs.get_logger()

    # --- pushes

    def accept(
        self,
        header: Header,
        shard: int,
        gradient: Tensor | None,
        state: Tensor | None = None,
        note: GradientNote = PLAIN,
        *,
        finite: bool,
    ) -> None:
        if self._step.accept(header.step, shard, header.rank, finite=finite):
            owned = self.owned_shards[shard]
            if gradient is not None:
                owned.take_gradient(header.rank, gradient, note)
            if state is not None:
                owned.take_state(header.rank, state)

    def on_norms(self, told: NormsTold) -> None:
        self._step.handle(told)

    def send_state(self, peer: Connection) -> None:
        """What was on its way when a connection broke is lost: say it again."""
        for step, norms in self._step.norms_to_repeat().items():
            self._send_norms(peer, step, norms)

    def send_clocks(self, connection: Connection) -> None:
        """CLOCKS: by rank, how many of its steps have arrived here, and are committed.

        With stages workers only want an answer: whatever they sent before has been taken, or refused, when it comes.
        """
        ranks = self._tools.config.ranks
        payload = np.array([*self._step.clocks(ranks), *[self.committed] * ranks], dtype="<i8").tobytes()
        header = Header(Kind.CLOCKS, self.plan.term, self.plan.revision, self.committed, length=len(payload))
        self._tools.connections.send(connection, header, payload)

    @property
    def missing(self) -> str:
        step, plan = f"step {self._step.version}", self.plan
        missing = {
            Cell(rank, stage)
            for shard, ranks in self._step.missing.items()
            for stage in self.owned_shards[shard].shard.stages
            for rank in ranks
        }
        if missing:
            return f"gradients of {step} from {_held_by(plan, missing, self._step.version)}"
        if servers := sorted({plan.owner_of(shard).id for shard in self._step.untold}):
            return f"norms of {step} from {names(servers)}"
        readers = [client for client in self._tools.shared_parameters.clients.values() if client.reading is not None]
        if readers and self._step.verdict() is Verdict.APPLY:
            return f"{names(sorted(each.member for each in readers))} to read version {self.version} no more"
        return ""

    # --- the life of a step

    def handle(self, event: Event) -> None:
        if self._failpoints and isinstance(event, Applied):
            failpoint("step.applied")
        self._step.handle(event)
        if isinstance(event, Applied):
            self._on_version()

    def may_answer(self, await_header: Header) -> bool:
        return self._step.version >= await_header.step

    def _now(self) -> Now:
        version = self._step.version
        return Now(
            self.plan,
            version,
            self._step.committed,
            self.owned_shards,
            self._changed,
            lambda header: version if version >= header.step else None,
        )

    def _ready(self) -> list[Instruction]:
        return self._step.ready(self._memory(), self._tools.waiters.awaited, may_copy=self._may_copy)

    def _memory(self) -> Memory:
        readers = [client for client in self._tools.shared_parameters.clients.values() if client.reading is not None]
        if not readers:
            return Memory.FREE
        holders = any(client.member in self.plan.cells for client in readers)
        return Memory.READ_BY_HOLDERS if holders else Memory.READ_BY_OTHERS

    def _execute(self, instruction: Instruction) -> None:
        match instruction:
            case Measure():
                self._measure([self.owned_shards[shard] for shard in instruction.shards])
            case TellNorms():
                for connection in list(self._tools.peers.values()):
                    self._send_norms(connection, instruction.step, instruction.squared_norms)
            case Apply():
                self._apply(instruction)
            case Skip():
                self._skip(instruction.step)
            case Follow():
                self._on_version()
            case Move():
                self._move()
            case _:
                super()._execute(instruction)

    def _measure(self, owned_shards: Sequence[OwnedShard]) -> None:
        if self._inline:
            norms = {owned.shard.index: owned.squared_norm(self._scratch) for owned in owned_shards}
            self._step.handle(Measured(norms))
        else:
            self._tools.arithmetic.measure(self.plan.term, owned_shards)

    def _apply(self, apply: Apply) -> None:
        """Update all shards in place: no worker reads the present version in this memory any more."""
        step, limit = apply.step, self._history.at(apply.step).clip_grad_norm
        if self._exchanges_in_turn:
            self._changed = self._changed_by(step)
        if self._failpoints:
            failpoint("step.complete")
        if self._recording:
            self._record_applied(step + 1)
        scale = clip_factor(apply.squared_norms, limit)
        if limit is not None:
            self._metrics["gradient_norm"] = math.sqrt(sum(apply.squared_norms))
        self._tools.connections.detach_all()
        for owned in self.versioned.values():
            owned.turn_states()
        streaming = self._tools.waiters.begin_streaming(step + 1)
        self._on_all(
            self._changed,
            lambda owned, scratch: owned.apply(scratch, step=step, grad_scale=scale),
            Applied(),
            each=self._say_updated(step + 1) if streaming else None,
        )

    def _changed_by(self, step: int) -> list[OwnedShard]:
        exchanges = self._tools.config.mode.exchanges
        return [
            owned
            for i, owned in self.versioned.items()
            if owned.shard.role is not TensorRole.TRAINED or exchanges(i, step)
        ]

    def _say_updated(self, version: int) -> Callable[[OwnedShard], None]:
        """What to do with each shard of the version that is being made: workers get it before the others are."""
        plan, post, waiters = self.plan, self._tools.post, self._tools.waiters
        if self._inline:
            return lambda owned: waiters.stream(plan, owned, version)
        return lambda owned: post(Updated(plan.term, owned.shard.index, version))

    def _skip(self, step: int) -> None:
        self._log.warning("skipping a step with NaN or Inf gradients", step=step)
        self._tools.metrics.add("skipped_steps")
        self._tools.journal.record("skipped", term=self.plan.term, version=step + 1)
        for owned in self.versioned.values():
            owned.turn_states()
            owned.drop_pushes()
        self._on_version()

    def _on_version(self) -> None:
        self._metrics["version"] = self._step.version
        self._tools.waiters.stale = True
        self._tools.relay.advance(self.plan, self._step.version)

    def _move(self) -> None:
        """Go on in a copy of the parameters: workers that hold no rank may read the present version on."""
        parameters = self._tools.shared_parameters
        readers = [client.member for client in parameters.clients.values() if client.reading is not None]
        self._log.info("leaving memory to workers that still read it", workers=readers)
        memory = SharedMemory.create("parameters", self._tools.layout.arena_bytes)
        parameters.move_to(memory)
        self._on_all(list(self.owned_shards.values()), lambda owned, _: owned.move_to(memory), Moved())

    def _send_norms(self, connection: Connection, step: int, norms: Mapping[int, float]) -> None:
        payload = np.array(list(norms.items()), dtype="<f8").tobytes()
        header = Header(Kind.NORM, self.plan.term, self.plan.revision, step, length=len(payload))
        self._tools.connections.send(connection, header, payload)

    def _record_applied(self, version: int) -> None:
        """Write down what goes into ``version``, before any process can learn of it."""
        counts: Counter[str] = Counter()
        sums: Counter[str] = Counter()
        for owned in self.trained:
            for rank, fingerprint in owned.fingerprints().items():
                cell = f"{rank}.{owned.shard.home}"
                counts[cell] += 1
                sums[cell] += fingerprint
        texts = {cell: fingerprint_text(total) for cell, total in sums.items()}
        self._tools.journal.record("applied", term=self.plan.term, version=version, shards=counts, sums=texts)


def _is_pushed(config: JobConfig, layout: Layout, shard: int, step: int) -> bool:
    """Whether the ranks push this shard in this step: to be exchanged, or at least to bring the state of a rank."""
    return config.mode.exchanges(shard, step) or (
        config.rank_state_is_due(step + 1) and rank_state_of(config, layout.shards[shard]) is not None
    )


def _held_by(plan: Plan, missing: Iterable[Cell], step: int) -> str:
    """Cells, with the workers that are to compute them in a step."""
    by_worker: dict[str, list[Cell]] = {}
    for cell in sorted(missing):
        by_worker.setdefault(plan.holder(cell.rank, cell.stage, step), []).append(cell)
    return names(
        f"{cells(held) if plan.stages > 1 else numbered('rank', [cell.rank for cell in held])} "
        f"({worker if worker != NO_WORKER else 'no worker has it'})"
        for worker, held in by_worker.items()
    )
