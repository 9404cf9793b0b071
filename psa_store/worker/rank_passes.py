"""The forward and backward passes of those cells of one rank that a worker holds, in one step.

When a pass is due decides :class:`psa_store.consistency.pipeline.Pipeline`. Between two stages a graph is cut in any
case, also where one worker holds both: each stage begins with tensors of its own, so bits do not depend on which worker
holds what. Before each forward pass the generators are seeded by (seed, step, rank, stage, micro-batch).

Where not all stages are in memory at once, most make their forward passes twice. The first time nothing is kept of them
but what went to the next stage. Both times a stage begins as its cell does in any worker: with the parameters and
buffers of the version.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from psa_store.consistency.pipeline import Backward, Forward, Pipeline
from psa_store.consistency.residence import Residence
from psa_store.errors import UsageError
from psa_store.job.layout import Layout, TensorRole
from psa_store.job.sampling import stream_seed
from psa_store.testing import failpoints
from psa_store.testing.failpoints import failpoint
from psa_store.worker.batches import RankStep
from psa_store.worker.carry import Parcel, as_it_travels, of_stage
from psa_store.worker.randomness import seed_all
from psa_store.worker.stages import StagedModel


@dataclass(frozen=True, slots=True)
class Ties:
    """``shared``: by stage and a later one, the parameters that both have, by index in the layout."""

    shared: Mapping[tuple[int, int], Sequence[int]]

    @property
    def senders(self) -> dict[int, list[int]]:
        """By stage that pushes the gradient of such, the others, in order."""
        homes = sorted({home for home, _ in self.shared})
        return {home: sorted(sender for each, sender in self.shared if each == home) for home in homes}


def ties_of(layout: Layout) -> Ties:
    """What the stages of a model share."""
    shared: dict[tuple[int, int], list[int]] = {}
    for index, spec in enumerate(layout.tensors):
        if spec.role is TensorRole.TRAINED:
            for sender in spec.stages[1:]:
                shared.setdefault((spec.home, sender), []).append(index)
    return Ties(shared)


Send = Callable[[int, int, bool, Parcel], None]
"""Sends a parcel to a stage of the rank: stage, micro-batch, whether it goes backward."""
_ALL_ALIKE = None


class RankPasses:
    """``microbatches``: the rank's batch, in parts. ``count``: how many stages there are. ``ties``: what they share.

    Of a model that can not have all its stages at once, what is held does not change in the middle.
    """

    def __init__(
        self,
        rank_step: RankStep,
        microbatches: Sequence[Any],
        count: int,
        ties: Ties,
        model: StagedModel,
        seed: int,
        send: Send,
    ) -> None:
        self.rank_step = rank_step
        self.loss: Tensor | None = None
        """Where the last stage is: the mean over micro-batches."""
        self._microbatches = microbatches
        self._last = count - 1
        self._model = model
        self._seed = seed
        self._send = send
        self._ties = ties
        self._pipeline = Pipeline(count, len(microbatches), ties.senders, model.resident_max)
        self._digests: dict[tuple[int, int], int] = {}
        """By stage and micro-batch, of what went to the next stage, where the pass is to be made once more."""
        self._inputs: dict[tuple[int, int], Parcel] = {}
        """By stage and micro-batch: what the stage before returned; while its graph lives, as leaves of it."""
        self._outputs: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._gradients: dict[tuple[int, int], Parcel] = {}
        self._tied: dict[tuple[int, int], Parcel] = {}
        """By stage and sender, its part of the gradient of parameters that both have."""
        self._kept: dict[tuple[int, int, bool], Parcel] = {}
        """What went from one stage here to the next: it is sent when that goes to another worker, if it may go."""
        self._came: set[tuple[int, int, bool]] = set()
        self._losses: list[Tensor] = []
        self._weights: list[float] = []
        self._total: float | None = _ALL_ALIKE
        self._failpoints = failpoints.are_on()

    # --- what has happened

    def hold(self, stages: Iterable[int]) -> None:
        """Compute these stages from now on, those that are new from their beginning."""
        before = self._pipeline.held
        self._pipeline.hold(stages)
        held = self._pipeline.held
        if self._model.resident_max is None:
            self._forget_tied(stage for stage in held if stage not in before)
        self._came = {key for key in self._came if key[0] in held}
        for to in [key for key in self._kept if key[0] not in held]:
            stage, _, backward = to
            parcel = self._kept.pop(to)
            if stage + (1 if backward else -1) in held:  # else its next holder sends it
                self._send(*to, parcel)
        if self._last not in held:
            self._losses, self._weights, self.loss = [], [], None

    def reside(self, residence: Residence) -> None:
        """These stages are in memory now, with what they have at the version."""
        self._pipeline.reside(residence)
        self._forget_tied(residence.stages)
        if not residence.backward:  # what the stages before have is needed before a gradient goes back to them
            latest = residence.stages[-1]
            for stage in range(latest):
                if stage not in self.held:
                    self._send(stage, len(self._microbatches) + self._last + 1 + latest, True, Parcel((), ()))

    def arrived(self, stage: int, microbatch: int, backward: bool, parcel: Parcel) -> None:
        """Something has come from another worker."""
        if stage in self._pipeline.held and (stage, microbatch, backward) not in self._came:
            self._came.add((stage, microbatch, backward))
            sender = microbatch - len(self._microbatches)
            if sender > self._last:
                self._pipeline.runs_ahead(stage)
                return
            if sender >= 0:
                self._tied[stage, sender] = parcel
                self._pipeline.tied(stage, sender)
                return
            (self._gradients if backward else self._inputs)[stage, microbatch] = parcel
            self._pipeline.arrived(stage, microbatch, backward=backward)

    # --- what is to be done

    @property
    def held(self) -> tuple[int, ...]:
        return self._pipeline.held

    @property
    def resident(self) -> tuple[int, ...]:
        """Those of them that are in memory."""
        return self._pipeline.residence.stages

    @property
    def whole(self) -> tuple[int, ...]:
        """Those whose gradients are there."""
        return self._pipeline.whole

    @property
    def residence_due(self) -> Residence | None:
        """What to have in memory before there is another pass, where not all can be."""
        return self._pipeline.residence_due

    @property
    def finished(self) -> bool:
        """Whether all gradients of the stages here are there, but not yet handed over."""
        return self._pipeline.finished

    @property
    def waits_for(self) -> tuple[int, ...]:
        """The stages of other workers of which something must arrive before the next pass."""
        return self._pipeline.waits_for

    def turn(self) -> bool:
        """Make one pass; False if something must arrive before."""
        match self._pipeline.next():
            case Forward() as due:
                self._forward(due)
            case Backward() as due:
                self._backward(due)
            case None:
                return False
        return True

    def complete(self, stage: int) -> float:
        """Bring the gradients of a stage to the weighted mean over micro-batches, with the parts of stages that share
        parameters with it, in their order; returns the weight of the rank."""
        for sender in self._ties.senders.get(stage, ()):
            for index, part in zip(self._ties.shared[stage, sender], self._tied[stage, sender].tensors, strict=True):
                parameter = self._model.flat(stage).tensor(index)
                if part is not None:
                    parameter.grad = part.clone() if parameter.grad is None else parameter.grad.add_(part)
        total = self._total
        if total is _ALL_ALIKE:
            return 1.0
        if total:
            for parameter in self._model.module(stage).parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0 / total)
        return total

    # --- passes

    def _forward(self, due: Forward) -> None:
        stage, index = due.stage, due.microbatch
        step, rank = self.rank_step.step, self.rank_step.rank
        one_pass = self._last == 0 and len(self._microbatches) == 1  # then it is a model in one piece, with its bits
        purpose = "compute" if one_pass else f"stage {stage}, micro-batch {index}"
        seed_all(stream_seed(self._seed, step, rank, purpose))
        carry: Any = None
        leaves = Parcel((), ())
        if stage:
            leaves = _leaves(self._inputs[stage, index])
            if self._pipeline.residence.backward:
                self._inputs[stage, index] = leaves
            else:  # the stage may write to it, and will get it once more
                leaves = leaves.copy()
            carry = leaves.tensors[0] if leaves.single else leaves.tensors
        returned = self._model.module(stage)(carry, self._microbatches[index])
        outputs: tuple[Tensor, ...]
        if stage == self._last:
            outputs = (self._as_loss(returned),)
        else:
            parcel = of_stage(returned, stage)
            outputs = (returned,) if parcel.single else tuple(returned)
            self._hand_on(stage, index, parcel)
        if self._pipeline.residence.backward:
            self._outputs[stage, index] = outputs
        self._model.check_graph(stage, leaves.tensors, outputs)
        self._pipeline.done(due)

    def _hand_on(self, stage: int, index: int, parcel: Parcel) -> None:
        """Send what a stage returned to the next, or, the second time, see that it is the same."""
        former = self._digests.pop((stage, index), None)
        if former is None:
            if not self._pipeline.residence.backward:
                self._digests[stage, index] = parcel.digest()
            self._deliver(stage + 1, index, False, parcel)
        elif former != parcel.digest():
            step, rank = self.rank_step.step, self.rank_step.rank
            raise UsageError(
                f"stage {stage} of rank {rank} was computed twice in step {step}, with other results, as "
                f"resident_stages={self._model.resident_max} wants: it must be a function of its parameters and "
                "buffers, its carry, its micro-batch and the random numbers that it is given"
            )

    def _as_loss(self, returned: Any) -> Tensor:
        """What a micro-batch adds to the gradient: its loss, by its weight if it has one."""
        weight = None
        if isinstance(returned, tuple) and len(returned) == 2:
            returned, weight = returned
            weight = float(weight)
            if not 0.0 <= weight < float("inf"):
                raise UsageError(f"the last stage returned the weight {weight}: it must be a number of at least 0")
        if not isinstance(returned, Tensor) or returned.numel() != 1:
            what = f"tensor of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else type(returned)
            raise UsageError(f"the last stage returned a {what}: give the loss, one number, or (loss, weight)")
        if (weight is None) is not (not self._weights) and self._losses:
            raise UsageError("the last stage returned a weight for some micro-batches only: give one for each, or none")
        self._losses.append(returned.detach())
        if weight is None:
            return returned / len(self._microbatches)
        self._weights.append(weight)
        # Left out altogether, be its loss NaN: 0 times NaN is NaN.
        weighted: Tensor = returned * weight if weight else torch.zeros_like(returned, requires_grad=False)
        return weighted

    def _backward(self, due: Backward) -> None:
        stage, index = due.stage, due.microbatch
        if self._failpoints:
            failpoint("cell.backward", index)
        flat = self._model.flat(stage).backward
        is_last = index == len(self._microbatches) - 1
        outputs = self._outputs.pop((stage, index))
        with nullcontext() if is_last else flat.accumulate():
            if stage == self._last:
                if outputs[0].requires_grad:
                    outputs[0].backward()  # type: ignore[no-untyped-call]
                if is_last:
                    self._end_loss()
            else:
                parcel = self._gradients.pop((stage, index))
                if is_last:
                    self._total = parcel.weight
                pairs = [(o, g) for o, g in zip(outputs, parcel.tensors, strict=True) if g is not None]
                if pairs:
                    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        if stage:
            leaves = self._inputs.pop((stage, index))
            given = [None if leaf is None else leaf.grad for leaf in leaves.tensors]
            gradients = tuple(None if gradient is None else as_it_travels(gradient) for gradient in given)
            weight = self._total if is_last else None
            self._deliver(stage - 1, index, True, Parcel(gradients, leaves.wants_gradient, leaves.single, weight))
        self._pipeline.done(due)
        if is_last:
            self._send_tied(stage)

    def _send_tied(self, stage: int) -> None:
        """Send the stage's part of the gradient of parameters that belong to another one."""
        for (home, sender), shared in self._ties.shared.items():
            if sender == stage:
                gradients = tuple(self._model.flat(stage).tied[index].grad for index in shared)
                for index in shared:
                    self._model.flat(stage).tied[index].grad = None
                self._deliver(home, len(self._microbatches) + sender, True, Parcel(gradients, (False,) * len(shared)))

    def _end_loss(self) -> None:
        losses = torch.stack([loss.float().reshape(()) for loss in self._losses])
        if self._weights:
            weights = torch.tensor(self._weights, dtype=torch.float64)
            self._total = float(weights.sum())
            counted = weights > 0
            losses = losses[counted] * weights[counted].to(losses) / (self._total or 1.0)
            self.loss = losses.sum()
        else:
            self.loss = losses.mean()

    def _forget_tied(self, stages: Iterable[int]) -> None:
        """Parameters that belong to other stages have no gradients."""
        for parameter in (parameter for stage in stages for parameter in self._model.flat(stage).tied.values()):
            parameter.grad = None

    def _deliver(self, stage: int, microbatch: int, backward: bool, parcel: Parcel) -> None:
        if stage in self._pipeline.held:
            if self._model.resident_max is None:
                self._kept[stage, microbatch, backward] = parcel
            self.arrived(stage, microbatch, backward, parcel)
        else:
            self._send(stage, microbatch, backward, parcel)
            if self._failpoints:
                failpoint("cell.sent")


def _leaves(parcel: Parcel) -> Parcel:
    """The same tensors, at which backward ends."""
    leaves = []
    for tensor, wants in zip(parcel.tensors, parcel.wants_gradient, strict=True):
        assert tensor is not None
        leaves.append(tensor.detach().requires_grad_(wants))
    return replace(parcel, tensors=tuple(leaves))
