"""The synchronous course: collect the gradients of all ranks, measure, apply to all shards at once, publish, commit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from functools import partial

import numpy as np
from torch import Tensor

from psa_store import logs
from psa_store.cluster import Phase, Plan
from psa_store.consistency import Offer, SyncStep, Verdict
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.optim.rank_state import rank_state_of
from psa_store.optim.reduce import clip_factor
from psa_store.server.aggregator.base import Aggregator, Done, Tools
from psa_store.server.arithmetic import ShardWork
from psa_store.server.messages import Applied, Measured, Moved, Snapped, ToEventLoop, Updated
from psa_store.server.shard import OwnedShard
from psa_store.server.waiters import Now
from psa_store.testing.failpoints import failpoint
from psa_store.testing.journal import fingerprint_text
from psa_store.wire import Connection, Flag, Header, Kind, SharedMemory

_NOBODY = -1


class Stage(Enum):
    COLLECTING = auto()
    MOVING = auto()
    """Parameters are being copied to other memory, because somebody may still read the present version in the old."""
    APPLYING = auto()
    SNAPPING = auto()


class SyncAggregator(Aggregator):
    """See the module. The life of a step can be read in :meth:`advance`."""

    def __init__(self, tools: Tools, plan: Plan, owned_shards: Mapping[int, OwnedShard]) -> None:
        super().__init__(tools, plan, owned_shards)
        self._stage = Stage.COLLECTING
        self._step = SyncStep(
            version=plan.resume,
            ranks=tools.config.ranks,
            trained=[owned.shard.index for owned in self.trained],
            buffers=[i for i, owned in owned_shards.items() if owned.shard.role is TensorRole.BUFFER],
            all_shards=[shard.index for shard in tools.layout.versioned],
            needs_norms=tools.optimizer.clip_grad_norm is not None,
            backup=tools.config.mode.backup,
            # No method of ours: in a cycle, the shards of a term that is over would keep their memory for long.
            pushed=partial(_is_pushed, tools.config, tools.layout),
        )
        self._changed = list(self.versioned.values())
        """The shards that the present version changed."""
        self._committing = plan.resume
        self._told = _NOBODY
        self._to_measure: list[OwnedShard] = []
        self._log = logs.get_logger()

    @property
    def version(self) -> int:
        return self._step.version

    @property
    def stage(self) -> str:
        return self._stage.name.lower()

    @property
    def stands_at(self) -> int | None:
        return None if self._stage is Stage.APPLYING else self._step.version

    def offer(self, header: Header, shard: int) -> Offer:
        return self._step.offer(header.step, shard, header.rank)

    def accept(self, header: Header, shard: int, gradient: Tensor | None, state: Tensor | None = None) -> None:
        owned = self.owned_shards[shard]
        if gradient is not None:
            owned.take_gradient(header.rank, gradient)
        if state is not None:
            owned.take_state(header.rank, state)
        if self._step.accept(shard, header.rank, finite=not header.flags & Flag.NONFINITE):
            self._to_measure.append(owned)

    def on_norms(self, step: int, norms: Mapping[int, float]) -> None:
        self._step.on_norms(step, norms)

    def send_state(self, peer: Connection) -> None:
        """What was on its way when a connection broke is lost: say it again."""
        for step, norms in self._step.norms_to_repeat().items():
            self._send_norms(peer, step, norms)

    def send_clocks(self, connection: Connection) -> None:
        """CLOCKS, for who speculates: by rank, how many of its steps have arrived here, and how many are committed."""
        if not self._tools.config.mode.speculate:
            super().send_clocks(connection)
        ranks = self._tools.config.ranks
        payload = np.array([*self._step.clocks(ranks), *[self.committed] * ranks], dtype="<i8").tobytes()
        header = Header(Kind.CLOCKS, self.plan.term, self.plan.revision, self.committed, length=len(payload))
        self._tools.connections.send(connection, header, payload)

    def handle(self, message: Done) -> None:
        match message:
            case Measured():
                for shard, squared_norm in message.squared_norms.items():
                    self._step.measured(shard, squared_norm)
            case Updated():
                self._tools.pending.stream(self.plan, self.owned_shards[message.shard], message.version)
            case Moved():
                self._stage = Stage.COLLECTING
            case Applied():
                failpoint("step.applied")
                self._step.advance()
                self._tools.metrics.set("version", self.version)
                self._stage = Stage.COLLECTING
            case Snapped():
                pin = self._cut if self._is_cut(message.version) else None
                self._cut = None if pin is not None else self._cut
                self._tools.committer.submit(self._work(message.version, pin))
                self._stage = Stage.COLLECTING

    def end(self) -> None:
        if self._stage is Stage.SNAPPING:
            self._tools.committer.cancel()

    # --- the life of a step

    def advance(self) -> None:
        """Do what can be done now: answer, commit, tell norms, and go on to the next version."""
        if self._stage is not Stage.COLLECTING:
            return
        if self._cut is not None and self._cut.version is not None and self.version > self._cut.version:
            self._miss()
        self._tools.pending.answer(
            Now(
                self.plan,
                self.version,
                self.committed,
                self.owned_shards,
                self._changed,
                self._tools.shared_parameters,
                self._reached,
            )
        )
        if self._to_measure:
            owned_shards, self._to_measure = self._to_measure, []
            self._tools.arithmetic.measure(self.plan.term, owned_shards, inline=self._inline)
        if self._commit_is_due():
            # The state of this version must be copied before it may change: if storage is slower than training,
            # training waits here.
            if self._tools.committer.reserve():
                self._committing = self.version
                self._stage = Stage.SNAPPING
                owned_shards = list(self.versioned.values())
                self._on(owned_shards, lambda owned, _: owned.take_snapshot(), Snapped(self.plan.term, self.version))
            return
        self._tell_norms()
        if self._tools.pending.finish_is_due(self.version) or self.plan.phase is not Phase.RUN:
            self._tools.committer.hurry()
        if self._held(self.version, self.version):
            return
        match self._step.verdict():
            case Verdict.APPLY:
                self._apply()
            case Verdict.SKIP:
                self._log.warning("skipping a step with NaN or Inf gradients", step=self.version)
                self._tools.metrics.add("skipped_steps")
                self._tools.journal.record("skipped", term=self.plan.term, version=self.version + 1)
                for owned in self.versioned.values():
                    owned.turn_states()
                    owned.drop_pushes()
                self._step.advance()
                self._tools.metrics.set("version", self.version)
                self.advance()
            case Verdict.WAIT:
                pass

    def _reached(self, header: Header) -> int | None:
        return self.version if self.version >= header.step else None

    def _is_cut(self, version: int) -> bool:
        """Whether a checkpoint is to be taken at this version."""
        return self._cut is not None and self._cut.version == version

    def _commit_is_due(self) -> bool:
        version = self.version
        if self._is_cut(version):
            return True  # also if it is committed already: to be pinned it is committed once more
        if version in (self._committing, self.committed):
            return False
        every = self._tools.config.commit_every
        return (
            (every > 0 and version % every == 0)
            or version == self.plan.stop_version
            or self._tools.pending.finish_is_due(version)
        )

    def _tell_norms(self) -> None:
        norms = self._step.own_norms()
        if norms is None or self._told == self.version:
            return
        self._told = self.version
        for connection in list(self._tools.peers.values()):
            self._send_norms(connection, self.version, norms)

    def _send_norms(self, connection: Connection, step: int, norms: Mapping[int, float]) -> None:
        payload = np.array(list(norms.items()), dtype="<f8").tobytes()
        header = Header(Kind.NORM, self.plan.term, self.plan.revision, step, length=len(payload))
        self._tools.connections.send(connection, header, payload)

    def _apply(self) -> None:
        """Update all shards in place, once nobody reads the present version in our memory any more.

        A worker that holds a rank will be done with it soon, or lose the rank, or die. One that holds none (it was
        paused, or its ranks went to another) may read on for as long as it likes: we leave it the memory, and go on in
        a copy.
        """
        plan, shared_parameters = self.plan, self._tools.shared_parameters
        readers = shared_parameters.readers()
        if any(client.member in plan.ranks for client in readers):
            return
        if readers:
            self._log.info("leaving memory to workers that still read it", workers=[each.member for each in readers])
            memory = SharedMemory.create("parameters", self._tools.layout.arena_bytes)
            self._stage = Stage.MOVING
            shared_parameters.move_to(memory)
            self._tools.arithmetic.on_all(
                plan.term,
                list(self.owned_shards.values()),
                lambda owned, _: owned.move_to(memory),
                Moved(plan.term),
                inline=self._inline,
            )
            return
        step, mode = self.version, self._tools.config.mode
        self._changed = [
            owned
            for i, owned in self.versioned.items()
            if owned.shard.role is not TensorRole.TRAINED or mode.exchanges(i, step)
        ]
        failpoint("step.complete")
        self._record_applied(step + 1)
        norms = self._step.norms_in_order()
        scale = clip_factor(norms, self._tools.optimizer.clip_grad_norm)
        if self._tools.optimizer.clip_grad_norm is not None:
            self._tools.metrics.set("gradient_norm", math.sqrt(sum(norms)))
        self._tools.connections.detach_all()
        for owned in self.versioned.values():
            owned.turn_states()
        self._stage = Stage.APPLYING
        streaming = self._tools.pending.begin_streaming(step + 1)
        self._on(
            self._changed,
            lambda owned, scratch: owned.apply(scratch, step=step, grad_scale=scale),
            Applied(plan.term),
            each=self._say_updated(plan.term, step + 1) if streaming else None,
        )

    def _record_applied(self, version: int) -> None:
        """Write down what goes into ``version``, before anybody can learn of it."""
        journal = self._tools.journal
        if not journal.enabled:
            return
        ranks = range(self._tools.config.ranks)
        prints = [each for each in (owned.fingerprints() for owned in self.trained) if each]
        counts = {rank: sum(rank in each for each in prints) for rank in ranks}
        sums = {rank: fingerprint_text(sum(each.get(rank, 0) for each in prints)) for rank in ranks}
        journal.record("applied", term=self.plan.term, version=version, ranks=counts, sums=sums)

    def _say_updated(self, term: int, version: int) -> Callable[[OwnedShard], None]:
        return lambda owned: self._tools.post(Updated(term, owned.shard.index, version))

    def _on(
        self,
        owned_shards: Sequence[OwnedShard],
        work: ShardWork,
        done: ToEventLoop,
        each: Callable[[OwnedShard], None] | None = None,
    ) -> None:
        self._tools.arithmetic.on_all(self.plan.term, owned_shards, work, done, inline=self._inline, each=each)


def _is_pushed(config: JobConfig, layout: Layout, shard: int, step: int) -> bool:
    """Whether the ranks push this shard in this step: to be exchanged, or at least to bring what they carry."""
    return config.mode.exchanges(shard, step) or (
        config.rank_state_is_due(step + 1) and rank_state_of(config, layout.shards[shard]) is not None
    )
