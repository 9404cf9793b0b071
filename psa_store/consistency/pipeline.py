"""The order in which a worker computes the stages that it holds of one rank in one step: 1F1B.

Each stage makes one forward and one backward pass of each micro-batch, both in the order of micro-batches. A forward
pass needs what the stage before returned, a backward pass what the stage after gives back; the first and the last stage
need nothing more. Stage k of S has at most S - k micro-batches between its two passes, so it keeps that many
activations, however many micro-batches there are. What can be done backward is done first, in later stages before
earlier ones.

The order decides when something is computed, never what: gradients add up in the order of micro-batches in any case.
So all workers may choose for themselves, and the bits are those of all forward passes first.

No choice of which worker holds which stage blocks: the last stage can always go backward from what it has computed, and
each stage behind it makes room for the one before.

A worker may have fewer stages in memory at once than it computes; then :mod:`psa_store.consistency.residence` says
which. It makes all forward passes of a stage before it makes a backward one, so the stages before must go on without
room: it tells them to run ahead.

Source: PipeDream-Flush, https://arxiv.org/abs/2006.09503, section 2.2.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from psa_store.consistency.residence import Residence, next_residence


@dataclass(frozen=True, slots=True)
class Forward:
    """Let a stage compute a micro-batch."""

    stage: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Let a stage compute the gradients of a micro-batch."""

    stage: int
    microbatch: int


@dataclass(slots=True)
class _Stage:
    forwards: int = 0
    """Passes that are done."""
    backwards: int = 0
    activations: set[int] = field(default_factory=set)
    """Micro-batches of which the stage before has sent its result ..."""
    gradients: set[int] = field(default_factory=set)
    """... and the stage after the gradient of it."""
    ties: set[int] = field(default_factory=set)
    """Stages that have sent their part of the gradient of parameters that they share with this one."""
    runs_ahead: bool = False
    """Whether a later stage needs all activations before it gives gradients back."""
    forwarded: bool = False
    """Whether all forward passes were made while it was in memory for them only."""


class Pipeline:
    """One rank's stages in one step. Not thread-safe.

    Args:
        ties: by stage, the later ones that share parameters with it, and send their part of the gradient.
        resident_max: how many stages this worker can have in memory at once; None: all. Otherwise what is held does not
            change in the middle.
    """

    def __init__(
        self,
        stages: int,
        microbatches: int,
        ties: Mapping[int, Collection[int]] = MappingProxyType({}),
        resident_max: int | None = None,
    ) -> None:
        self._last = stages - 1
        self._microbatches = microbatches
        self._ties = ties
        self._resident_max = resident_max
        self._held: dict[int, _Stage] = {}
        self.residence = Residence((), backward=True)
        """What is in memory of what is held."""

    # --- what has happened

    def hold(self, stages: Iterable[int]) -> None:
        """This worker computes these from now on: new ones from their beginning, and those that it had as they are."""
        self._held = {stage: self._held.get(stage) or _Stage() for stage in stages}
        if self._resident_max is None:
            self.residence = Residence(self.held, backward=True)

    def reside(self, residence: Residence) -> None:
        """These stages are in memory, in place of others: make passes of them, from their beginning."""
        self.residence = residence
        for stage in residence.stages:
            self._held[stage].forwards = 0

    def arrived(self, stage: int, microbatch: int, *, backward: bool) -> None:
        """Something is here for a stage: activations, or their gradients."""
        held = self._held.get(stage)
        if held is not None:
            (held.gradients if backward else held.activations).add(microbatch)

    def tied(self, stage: int, other: int) -> None:
        """The part of another stage in the gradient of shared parameters is here, for this stage."""
        if stage in self._held:
            self._held[stage].ties.add(other)

    def runs_ahead(self, stage: int) -> None:
        """A later stage needs all activations of this one before it gives a gradient back."""
        if stage in self._held:
            self._held[stage].runs_ahead = True

    def done(self, instruction: Forward | Backward) -> None:
        """An instruction is carried out."""
        held = self._held[instruction.stage]
        if isinstance(instruction, Forward):
            held.forwards += 1
            held.forwarded |= held.forwards == self._microbatches and not self.residence.backward
        else:
            held.backwards += 1

    # --- what is to be done

    @property
    def held(self) -> tuple[int, ...]:
        """The stages that are computed here."""
        return tuple(sorted(self._held))

    @property
    def whole(self) -> tuple[int, ...]:
        """The stages of which all is done."""
        return tuple(stage for stage in self.held if self._is_whole(stage))

    @property
    def finished(self) -> bool:
        """Whether all is done here."""
        return all(map(self._is_whole, self._held))

    @property
    def residence_due(self) -> Residence | None:
        """What to have in memory before there is another pass; None: what is there, or nothing is left."""
        here, left = self.residence, [stage for stage in self.held if not self._is_whole(stage)]
        if self._resident_max is None or not left:
            return None
        forwarded = {stage for stage, held in self._held.items() if held.forwarded}
        if set(here.stages).isdisjoint(left) if here.backward else forwarded.issuperset(here.stages):
            return next_residence(left, forwarded, self._resident_max)
        return None

    def next(self) -> Forward | Backward | None:
        """What to do now; None: something must arrive before, or other stages must be in memory."""
        for stage in reversed(self.residence.stages):
            held = self._held[stage]
            if self._goes_backward(stage) and (stage == self._last or held.backwards in held.gradients):
                return Backward(stage, held.backwards)
            here = stage == 0 or held.forwards in held.activations
            if self._may_go_forward(stage) and here:
                return Forward(stage, held.forwards)
        return None

    @property
    def waits_for(self) -> tuple[int, ...]:
        """The stages of other workers of which something must arrive before there is anything to do."""
        if self.next() is not None or self.residence_due is not None:
            return ()
        awaited = set()
        for stage in self.residence.stages:
            held = self._held[stage]
            if self._goes_backward(stage):
                awaited.add(stage + 1)
            if self._may_go_forward(stage):
                awaited.add(stage - 1)
            if held.backwards == self._microbatches:
                awaited |= set(self._ties.get(stage, ())) - held.ties
        return tuple(sorted(awaited - self._held.keys()))

    def _is_whole(self, stage: int) -> bool:
        held = self._held[stage]
        return held.backwards == self._microbatches and held.ties >= set(self._ties.get(stage, ()))

    def _goes_backward(self, stage: int) -> bool:
        held = self._held[stage]
        return self.residence.backward and held.backwards < held.forwards

    def _may_go_forward(self, stage: int) -> bool:
        """Whether a stage has micro-batches left, and room for the activations of one more."""
        held = self._held[stage]
        has_room = held.forwards - held.backwards < self._last - stage + 1
        return held.forwards < self._microbatches and (has_room or held.runs_ahead or not self.residence.backward)
