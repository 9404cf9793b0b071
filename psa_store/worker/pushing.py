"""The way of one rank's gradient to the servers: checked, compressed, pushed, shard by shard as they become whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from psa_store.compression.codec import decode, encode
from psa_store.errors import NonFiniteGradient
from psa_store.job.config import JobConfig
from psa_store.job.layout import Shard, TensorRole
from psa_store.job.sampling import rounding_stream
from psa_store.optim.note import PLAIN, GradientNote
from psa_store.optim.tensors import as_bytes
from psa_store.testing.failpoints import failpoint
from psa_store.testing.journal import Journal, fingerprint_text
from psa_store.wire import Flag
from psa_store.worker.batches import RankStep
from psa_store.worker.gradients import NORM_SURELY_FINITE, GradientMemory
from psa_store.worker.session import PlanSession, Tools

_PUSH_SHARDS = 16
"""Shards that are checked and then pushed together, where many are ready at once: the first travel meanwhile."""

ResidualOf = Callable[[int, Shard], Tensor | None]
"""What a rank has held back of a shard so far, where the compression holds something back."""


class GradientPush:
    """Pushes one gradient after the other: :meth:`begin`, then :meth:`push` for all shards, then :meth:`done`."""

    rank_step: RankStep
    gradients: GradientMemory

    def __init__(self, tools: Tools, session: PlanSession, residual_of: ResidualOf) -> None:
        self._config = tools.config
        self._shards = tools.layout.shards
        self._servers = tools.servers
        self._journal = tools.journal
        self._session = session
        self._residual_of = residual_of
        self._compressed = {
            shard.index
            for shard in tools.layout.shards_of(TensorRole.TRAINED)
            if tools.config.compression.applies_to(shard.dtype)
        }
        self._fingerprints: dict[int, int] = {}
        """By stage, the sum over those of its shards that were pushed; a model in one piece is stage 0."""
        self.flaw = ""
        """A parameter whose gradient is not finite, in a job that does not skip such."""
        self._state_of: Mapping[int, Callable[[], Tensor]] = {}
        self.payloads: dict[int, Tensor] = {}
        """The encodings of the present gradient that have been pushed, by shard."""

    def begin(
        self, rank_step: RankStep, gradients: GradientMemory, state_of: Mapping[int, Callable[[], Tensor]] | None = None
    ) -> None:
        """A gradient is about to be computed. ``state_of``: by shard, the rank state that is pushed behind it."""
        self.rank_step, self.gradients = rank_step, gradients
        self._fingerprints, self.flaw, self.payloads = {}, "", {}
        self._state_of = state_of or {}

    def go_on(self, gradients: GradientMemory) -> None:
        """What was pushed of the gradient needs its memory no more; the rest will be in this."""
        self.gradients, self.payloads = gradients, {}

    def computing(self, stage: int = 0) -> None:
        """A cell of the rank is about to be computed."""
        if self._session.recording:
            step, rank = self.rank_step.step, self.rank_step.rank
            self._journal.record("computing", term=self._session.term, step=step, rank=rank, stage=stage)

    def push(self, shards: Sequence[int], *, finite: bool = True) -> None:
        """Check the gradients of some shards, unless they are known not to be finite, and push them."""
        for start in range(0, len(shards), _PUSH_SHARDS):
            some = shards[start : start + _PUSH_SHARDS]
            flaw = ""
            if finite:
                for shard in some:
                    if not float(torch.linalg.vector_norm(self.gradients.numbers[shard])) < NORM_SURELY_FINITE:
                        flaw = flaw or self.gradients.flaw(shard)
            if flaw and not self._config.skip_nonfinite:
                self.flaw = self.flaw or flaw
                return
            if self._compressed:
                self._encode(some)
            if self._session.recording:
                for shard in some:
                    stage = self._shards[shard].home
                    self._fingerprints[stage] = self._fingerprints.get(stage, 0) + self._digest(shard)
            self.send(self.rank_step, some, self.gradients, self.payloads, self.note, finite=finite and not flaw)
            if self._session.failpoints:
                failpoint("push.middle", some[-1])

    @property
    def note(self) -> GradientNote:
        """What is said of the present gradient.

        Where compression holds something back, each push also brings what was held back before. That is not lost: such
        a gradient always counts, as zero if there is none.
        """
        note = self.gradients.note
        if note is PLAIN or not self._config.compression.needs_residual:
            return note
        return GradientNote(note.weight or 1.0)

    def send(
        self,
        rank_step: RankStep,
        shards: Sequence[int],
        gradients: GradientMemory | None,
        payloads: Mapping[int, Tensor],
        note: GradientNote,
        *,
        finite: bool,
    ) -> None:
        """Push those of these shards that are compressed as ``payloads``, and the others as they are."""
        step, rank = rank_step.step, rank_step.rank
        if payloads:
            state_of = self._state_of
            flags = (Flag.STATE if state_of else Flag.NONE) | (Flag.NONE if finite else Flag.NONFINITE)
            for shard in (shard for shard in shards if shard in payloads):
                payload = payloads[shard]
                if state_of:
                    payload = torch.cat([payload, state_of[shard]()])
                self._servers.push_value(step, rank, shard, as_bytes(payload), flags, note)
            shards = [shard for shard in shards if shard not in payloads]
        if shards:
            assert gradients is not None
            self._servers.push(step, rank, shards, gradients, note, finite=finite)

    def done(self, stages: Iterable[int] = (0,)) -> None:
        """The whole gradients of these cells are on their way, and what belongs to them."""
        step, rank = self.rank_step.step, self.rank_step.rank
        sums = {stage: self._fingerprints.get(stage, 0) for stage in stages}
        record_pushed(self._session, self._journal, step, rank, sums)

    def _encode(self, shards: Iterable[int]) -> None:
        """Make the payloads of those shards that are compressed."""
        config, step, rank = self._config, self.rank_step.step, self.rank_step.rank
        for shard in (self._shards[index] for index in shards if index in self._compressed):
            payload = torch.empty(config.compression.payload_bytes(shard.numel), dtype=torch.uint8)
            stream = rounding_stream(config.seed, step, rank, shard.index)
            residual = self._residual_of(rank, shard)
            encode(config.compression, self.gradients.numbers[shard.index], payload, stream=stream, residual=residual)
            self.payloads[shard.index] = payload

    def _digest(self, shard: int) -> int:
        payload = self.payloads.get(shard)
        return (
            self.gradients.fingerprint(shard) if payload is None else digest(self._config, self._shards[shard], payload)
        )


def refuse(rank_step: RankStep, flaw: str) -> NoReturn:
    """Raise NonFiniteGradient. ``flaw``: the parameter whose gradient is not finite."""
    raise NonFiniteGradient(
        f"rank {rank_step.rank} computed NaN or Inf at step {rank_step.step} in the gradient of "
        f"{flaw}. Lower the learning rate, clip, or skip such steps (--skip-nonfinite on a new job)."
    )


def digest(config: JobConfig, shard: Shard, payload: Tensor) -> int:
    """A digest of what the server will apply."""
    if config.compression.applies_to(shard.dtype):
        decoded = torch.empty(shard.numel)
        decode(config.compression, payload, decoded)
        payload = decoded
    return xxh3_64_intdigest(as_bytes(payload), seed=shard.index)


def record_pushed(session: PlanSession, journal: Journal, step: int, rank: int, sums: Mapping[int, int]) -> None:
    """All of a push is on its way. ``sums``: by stage, the sum of the fingerprints of its shards."""
    if session.recording:
        for stage, total in sums.items():
            where = {"term": session.term, "step": step, "rank": rank, "stage": stage}
            journal.record("pushed", **where, sum=fingerprint_text(total))
    if session.failpoints:
        failpoint("push.done")
