"""The synchronous course: collect the gradients of all ranks, measure, apply to all shards at once, publish, commit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from functools import partial

import numpy as np
from torch import Tensor

from psa_store import telemetry
from psa_store.consistency import Offer, SyncStep, Verdict
from psa_store.failpoints import failpoint
from psa_store.job import JobConfig
from psa_store.journal import fingerprint_text
from psa_store.layout import Layout, Role
from psa_store.optim.reduce import clip_factor
from psa_store.plan import Phase, Plan
from psa_store.rank_state import rank_state_of
from psa_store.server.arithmetic import ShardWork
from psa_store.server.course import Course, Done, Tools
from psa_store.server.lead import Lead
from psa_store.server.letters import Applied, Measured, Moved, Snapped, ToEngine, Updated
from psa_store.server.pending import Now
from psa_store.wire import Connection, Flag, Header, Kind, SharedMemory

_NOBODY = -1


class Stage(Enum):
    COLLECTING = auto()
    MOVING = auto()
    """Parameters are being copied to other memory, because somebody may still read the present version in the old."""
    APPLYING = auto()
    SNAPPING = auto()


class SyncCourse(Course):
    """See the module. The life of a step can be read in :meth:`advance`."""

    def __init__(self, tools: Tools, plan: Plan, leads: Mapping[int, Lead]) -> None:
        super().__init__(tools, plan, leads)
        self._stage = Stage.COLLECTING
        self._step = SyncStep(
            version=plan.resume,
            ranks=tools.config.ranks,
            trained=[lead.shard.index for lead in self.trained],
            buffers=[i for i, lead in leads.items() if lead.shard.role is Role.BUFFER],
            all_shards=[shard.index for shard in tools.layout.versioned],
            needs_norms=tools.optimizer.clip_grad_norm is not None,
            backup=tools.config.mode.backup,
            # No method of ours: in a cycle, the shards of an epoch that is over would keep their memory for long.
            pushed=partial(_is_pushed, tools.config, tools.layout),
        )
        self._changed = list(self.versioned.values())
        """The shards that the present version changed."""
        self._committing = plan.resume
        self._told = _NOBODY
        self._to_measure: list[Lead] = []
        self._log = telemetry.get_logger()

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
        lead = self.leads[shard]
        if gradient is not None:
            lead.take_gradient(header.rank, gradient)
        if state is not None:
            lead.take_state(header.rank, state)
        if self._step.accept(shard, header.rank, finite=not header.flags & Flag.NONFINITE):
            self._to_measure.append(lead)

    def hear(self, step: int, norms: Mapping[int, float]) -> None:
        self._step.hear(step, norms)

    def greet(self, peer: Connection) -> None:
        """What was on its way when a connection broke is lost: say it again."""
        for step, norms in self._step.norms_to_repeat().items():
            self._send_norms(peer, step, norms)

    def greet_worker(self, connection: Connection) -> None:
        """CLOCKS, for who speculates: by rank, how many of its steps have arrived here, and how many are committed."""
        if not self._tools.config.mode.speculate:
            super().greet_worker(connection)
        ranks = self._tools.config.ranks
        payload = np.array([*self._step.clocks(ranks), *[self.committed] * ranks], dtype="<i8").tobytes()
        header = Header(Kind.CLOCKS, self.plan.epoch, self.plan.revision, self.committed, length=len(payload))
        self._tools.reception.send(connection, header, payload)

    def obey(self, letter: Done) -> None:
        match letter:
            case Measured():
                for shard, squared_norm in letter.squared_norms.items():
                    self._step.measured(shard, squared_norm)
            case Updated():
                self._tools.pending.stream(self.plan, self.leads[letter.shard], letter.version)
            case Moved():
                self._stage = Stage.COLLECTING
            case Applied():
                failpoint("step.applied")
                self._step.advance()
                self._tools.vitals.set("version", self.version)
                self._stage = Stage.COLLECTING
            case Snapped():
                pin = self._cut if self._is_cut(letter.version) else None
                self._cut = None if pin is not None else self._cut
                self._tools.committer.submit(self._work(letter.version, pin))
                self._stage = Stage.COLLECTING

    def end(self) -> None:
        if self._stage is Stage.SNAPPING:
            self._tools.committer.cancel()

    # --- the life of a step

    def advance(self) -> None:
        """Do what can be done now: answer, commit, tell norms, and go on to the next version."""
        if self._stage is not Stage.COLLECTING:
            return
        if self._cut is not None and self.version > self._cut.version:
            self._miss()
        self._tools.pending.answer(
            Now(
                self.plan,
                self.version,
                self.committed,
                self.leads,
                self._changed,
                self._tools.publication,
                self._reached,
            )
        )
        if self._to_measure:
            leads, self._to_measure = self._to_measure, []
            self._tools.arithmetic.measure(self.plan.epoch, leads, inline=self._inline)
        if self._commit_is_due():
            # The state of this version must be copied before it may change: if storage is slower than training,
            # training waits here.
            if self._tools.committer.reserve():
                self._committing = self.version
                self._stage = Stage.SNAPPING
                leads = list(self.versioned.values())
                self._on(leads, lambda lead, _: lead.take_snapshot(), Snapped(self.plan.epoch, self.version))
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
                self._tools.vitals.add("skipped_steps")
                self._tools.journal.record("skipped", epoch=self.plan.epoch, version=self.version + 1)
                for lead in self.versioned.values():
                    lead.turn_states()
                    lead.drop_pushes()
                self._step.advance()
                self._tools.vitals.set("version", self.version)
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
            or (self.plan.phase is Phase.STOP and version == self.plan.mark)
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
        header = Header(Kind.NORM, self.plan.epoch, self.plan.revision, step, length=len(payload))
        self._tools.reception.send(connection, header, payload)

    def _apply(self) -> None:
        """Update all shards in place, once nobody reads the present version in our memory any more.

        A worker that holds a rank will be done with it soon, or lose the rank, or die. One that holds none (it was
        paused, or its ranks went to another) may read on for as long as it likes: we leave it the memory, and go on in
        a copy.
        """
        plan, publication = self.plan, self._tools.publication
        readers = publication.readers()
        if any(client.member in plan.ranks for client in readers):
            return
        if readers:
            self._log.info("leaving memory to workers that still read it", workers=[each.member for each in readers])
            memory = SharedMemory.create("parameters", self._tools.layout.arena_bytes)
            self._stage = Stage.MOVING
            publication.move_to(memory)
            self._tools.arithmetic.on_all(
                plan.epoch,
                list(self.leads.values()),
                lambda lead, _: lead.move_to(memory),
                Moved(plan.epoch),
                inline=self._inline,
            )
            return
        step, mode = self.version, self._tools.config.mode
        self._changed = [
            lead for i, lead in self.versioned.items() if lead.shard.role is not Role.TRAINED or mode.exchanges(i, step)
        ]
        failpoint("step.complete")
        self._record_applied(step + 1)
        norms = self._step.norms_in_order()
        scale = clip_factor(norms, self._tools.optimizer.clip_grad_norm)
        if self._tools.optimizer.clip_grad_norm is not None:
            self._tools.vitals.set("gradient_norm", math.sqrt(sum(norms)))
        self._tools.reception.detach_all()
        for lead in self.versioned.values():
            lead.turn_states()
        self._stage = Stage.APPLYING
        streaming = self._tools.pending.begin_streaming(step + 1)
        self._on(
            self._changed,
            lambda lead, scratch: lead.apply(scratch, step=step, grad_scale=scale),
            Applied(plan.epoch),
            each=self._say_updated(plan.epoch, step + 1) if streaming else None,
        )

    def _record_applied(self, version: int) -> None:
        """Write down what goes into ``version``, before anybody can learn of it."""
        journal = self._tools.journal
        if not journal.enabled:
            return
        ranks = range(self._tools.config.ranks)
        prints = [each for each in (lead.fingerprints() for lead in self.trained) if each]
        counts = {rank: sum(rank in each for each in prints) for rank in ranks}
        sums = {rank: fingerprint_text(sum(each.get(rank, 0) for each in prints)) for rank in ranks}
        journal.record("applied", epoch=self.plan.epoch, version=version, ranks=counts, sums=sums)

    def _say_updated(self, epoch: int, version: int) -> Callable[[Lead], None]:
        return lambda lead: self._tools.post(Updated(epoch, lead.shard.index, version))

    def _on(
        self, leads: Sequence[Lead], work: ShardWork, done: ToEngine, each: Callable[[Lead], None] | None = None
    ) -> None:
        self._tools.arithmetic.on_all(self.plan.epoch, leads, work, done, inline=self._inline, each=each)


def _is_pushed(config: JobConfig, layout: Layout, shard: int, step: int) -> bool:
    """Whether the ranks push this shard in this step: to be exchanged, or at least to bring what they carry."""
    return config.mode.exchanges(shard, step) or (
        config.rank_state_is_due(step + 1) and rank_state_of(config, layout.shards[shard]) is not None
    )
