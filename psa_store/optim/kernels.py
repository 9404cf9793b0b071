"""Reducing gradients and applying an optimizer to one shard, fused. Used by servers.

A shard is worked on block by block. The sum of a block's gradients is made in scratch memory that stays in the cache,
and used there: for the norm of the shard, or for the update. So memory is read once per rank, and no reduced gradient
is stored. With clipping the sum is made twice, once for the norm, which must be known before anything is updated: for
two gradients that takes about as long as to write their sum to memory and read it again. Only a shard of a single block
keeps its sum from the one to the other, in memory of its own: in a small job it is still in the cache.

Promises:

* Gradients are added in the order of ranks, in float32 at least, so that bits do not depend on arrival.
* The semantics of ``torch.optim``, parameter by parameter, with no loop over parameters: neighbours of one
  group are updated as one run, the padding between them included. Padding is zero and stays zero under every
  optimizer here, because a zero gradient on a zero parameter gives a zero update (``eps`` is never 0, see
  ``spec.EPS_MIN``).
* The same bits on every run. An element's bits depend on the element, its state and the step only: every run and block
  starts and ends on a multiple of 64 bytes, so that no element is ever left to the scalar tail of a vector
  loop. Servers call ``torch.set_num_threads(1)`` and work on several shards at a time instead; kernels of
  different shards share nothing.

Half-precision parameters have a float32 ``master`` copy and float32 state; the parameter is that, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from psa_store.job.average import Average
from psa_store.job.layout import Layout, Piece, Shard
from psa_store.optim.reduce import squared_norm, sum_in_order
from psa_store.optim.rules import DIVIDING, RULES, Moment, Rule, State
from psa_store.optim.slots import AVERAGE, MASTER, slot_dtype, state_names
from psa_store.optim.spec import Adagrad, Optimizer
from psa_store.optim.tensors import name_of, to_torch

BLOCK_ELEMENTS = 1 << 18
"""1 MiB of float32: small enough for the second-level cache to hold most of it, and large enough that memory is read in
long runs and that the calls (a few microseconds each, with Python's lock held) do not count."""

_NONE_SKIPPED: Mapping[int, int] = MappingProxyType({})


def init_slots(
    optimizer: Optimizer, param: Tensor, shard: Shard, layout: Layout, average: Average | None = None
) -> dict[str, Tensor]:
    """The slots of a shard before its first update. ``param``: its parameters, 1-D, padding included."""
    dtypes = slot_dtype(optimizer, shard.dtype, average)
    slots = {name: torch.zeros(shard.numel, dtype=to_torch(dtype)) for name, dtype in dtypes.items()}
    for name in slots.keys() & {MASTER, AVERAGE}:
        slots[name].copy_(param)
    if isinstance(optimizer, Adagrad):
        for piece in shard.pieces:
            start = piece.shard_start
            slots["sum"][start : start + piece.length] = optimizer.initial_accumulator_value
    return slots


def make_scratch() -> Tensor:
    """Memory that one thread needs to work on any shard, one at a time."""
    return torch.empty(BLOCK_ELEMENTS, dtype=torch.float64)


class ShardKernel:
    """Reduces and updates one shard. One thread at a time per shard; different shards are independent.

    ``param`` and ``slots`` are contiguous 1-D tensors of ``shard.numel`` elements, and stay the caller's; so is
    ``rounded``, if there is one, which follows ``param`` in another dtype. With ``average``, the slot of that name
    follows the parameters, whether or not they had a gradient.
    ``parts``, everywhere: the gradient of each rank, in the order of ranks, like ``param``, zero in the padding.
    ``scratch``: of the calling thread, from :func:`make_scratch`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        layout: Layout,
        shard: Shard,
        param: Tensor,
        slots: Mapping[str, Tensor],
        rounded: Tensor | None = None,
        average: Average | None = None,
    ) -> None:
        dtypes = slot_dtype(optimizer, shard.dtype, average)
        assert slots.keys() == dtypes.keys()
        assert all(name_of(slots[name].dtype) == dtype for name, dtype in dtypes.items())
        assert all(t.is_contiguous() and t.shape == (shard.numel,) for t in (param, *slots.values()))
        self._optimizer = optimizer
        self._average = average
        wide = slots.get(MASTER, param)
        self._wide_dtype = wide.dtype
        self._kept: Tensor | None = None
        """The memory for the sum of the one block."""
        self._layout = layout
        self._shard = shard
        self._state = {name: slots[name] for name in state_names(optimizer)}
        self._chain = [tensor for tensor in (wide if wide is not param else None, param, rounded) if tensor is not None]
        self._averages = slots.get(AVERAGE)
        self._blocks = self._make_blocks(frozenset(), {})
        self._uneven: tuple[object, list[_Block]] = None, []
        """The blocks of the last update that left tensors out, or came after such, and what they were made for."""

    def squared_norm(self, parts: Sequence[Tensor], scratch: Tensor, weights: Sequence[float] | None = None) -> float:
        """|mean of parts|²; inf or nan if an element of it is. ``weights``: see :meth:`apply`."""
        if len(self._blocks) > 1:
            place = scratch.view(self._wide_dtype)
        else:
            if self._kept is None:
                self._kept = torch.empty(self._blocks[0].high, dtype=self._wide_dtype)
            place = self._kept
        total = 0.0
        for block in self._blocks:
            total += squared_norm(sum_in_order(parts, block.low, block.high, place, weights))
        return total / _count(parts, weights) ** 2

    def apply(
        self,
        parts: Sequence[Tensor],
        scratch: Tensor,
        *,
        step: int,
        opt_step: int,
        grad_scale: float,
        measured: bool = False,
        weights: Sequence[float] | None = None,
        absent: frozenset[int] = frozenset(),
        skipped: Mapping[int, int] = _NONE_SKIPPED,
    ) -> None:
        """Apply one update with the mean of ``parts``.

        Args:
            weights: of each part in the mean, greater than 0; None: they count alike.
            absent: tensors of the layout that are left out, with their state.
            skipped: by tensor, from how many updates it was left out before.
            measured: whether the last :meth:`squared_norm` was that of these parts, since which no update was made.
            step: the step, for the learning-rate schedule.
            opt_step: updates applied before this one, for Adam's bias correction and SGD's first step.
            grad_scale: multiplies the gradient; the factor of ``clip_grad_norm``, or 1.0.
        """
        kept = self._kept if measured else None
        place = scratch.view(self._wide_dtype) if kept is None else kept
        divisor = _count(parts, weights) / grad_scale * (-1.0 if self._optimizer.maximize else 1.0)
        blocks = self._blocks if not absent and not skipped else self._uneven_blocks(absent, skipped)
        in_passing = self._wide_dtype is torch.float32 and isinstance(self._optimizer, DIVIDING)
        moments = {
            (group, skips): Moment(self._optimizer.lr_at(step, group), opt_step - skips, divisor if in_passing else 1.0)
            for group, skips in {(part.group, part.skipped) for block in blocks for part in block.parts}
        }
        for block in blocks:
            total = sum_in_order(parts, block.low, block.high, place, weights) if kept is None else kept
            if divisor != 1.0 and not in_passing:
                total.div_(divisor)
            grads = total.split_with_sizes(block.lengths) if len(block.lengths) > 1 else (total,)
            for part in block.parts:
                moment = moments[part.group, part.skipped]
                part.rule(part.optimizer, moment, part.params, [grads[i] for i in part.runs], part.state)
            for source, follower in pairwise(block.chain):
                follower.copy_(source)
            if block.average is not None and self._average is not None:
                if opt_step == 0:
                    block.average.copy_(block.chain[0])
                else:
                    block.average.lerp_(block.chain[0], 1.0 - self._average.decay)

    def _uneven_blocks(self, absent: frozenset[int], skipped: Mapping[int, int]) -> list[_Block]:
        """Where tensors differ in how many updates they have had; mostly they are those of the update before."""
        made_for = absent, {tensor: count for tensor, count in skipped.items() if tensor not in absent}
        if self._uneven[0] != made_for:
            self._uneven = made_for, self._make_blocks(*made_for)
        return self._uneven[1]

    def _make_blocks(self, absent: frozenset[int], skipped: Mapping[int, int]) -> list[_Block]:
        runs = _runs(self._layout, self._shard, absent, skipped)
        return [
            _Block.of(
                self._optimizer,
                low,
                min(low + BLOCK_ELEMENTS, self._shard.numel),
                runs,
                self._chain,
                self._state,
                self._averages,
            )
            for low in range(0, self._shard.numel, BLOCK_ELEMENTS)
        ]


def _count(parts: Sequence[Tensor], weights: Sequence[float] | None) -> float:
    """By what the sum of the parts is divided to be their mean."""
    return len(parts) if weights is None else sum(weights)


@dataclass(frozen=True, slots=True)
class _Part:
    """All runs of one block that are updated alike, ready to be updated by one call."""

    group: int
    skipped: int
    """From how many updates they were left out before."""
    optimizer: Optimizer
    rule: Rule
    runs: Sequence[int]
    params: list[Tensor]
    state: State


@dataclass(frozen=True, slots=True)
class _Block:
    """Elements [low, high) of a shard: the runs that tile it, grouped."""

    low: int
    high: int
    lengths: list[int]
    parts: list[_Part]
    chain: list[Tensor]
    """What is updated (parameters, or their float32 master), and what follows it, each a rounding of the one before."""
    average: Tensor | None

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        low: int,
        high: int,
        runs: Sequence[_Run],
        chain: Sequence[Tensor],
        state: Mapping[str, Tensor],
        average: Tensor | None,
    ) -> _Block:
        inside = [
            _Run(run.group, run.skipped, max(low, run.low), min(high, run.high))
            for run in runs
            if run.low < high and low < run.high
        ]
        lengths = [run.high - run.low for run in inside]
        parts = []
        for group, skipped in sorted({(run.group, run.skipped) for run in inside if run.skipped is not None}):
            own = [i for i, run in enumerate(inside) if (run.group, run.skipped) == (group, skipped)]
            spans = [(inside[i].low, inside[i].high) for i in own]
            parts.append(
                _Part(
                    group,
                    skipped,
                    optimizer.in_group(group),
                    RULES[type(optimizer)],
                    own,
                    [chain[0][start:end] for start, end in spans],
                    {name: [tensor[start:end] for start, end in spans] for name, tensor in state.items()},
                )
            )
        followed = None if average is None else average[low:high]
        return cls(low, high, lengths, parts, [tensor[low:high] for tensor in chain], followed)


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring elements that are updated alike. ``skipped``: None if they are left out of this update."""

    group: int
    skipped: int | None
    low: int
    high: int


def _runs(layout: Layout, shard: Shard, absent: frozenset[int], skipped: Mapping[int, int]) -> list[_Run]:
    """The runs that tile a shard; a run ends where a piece starts that is updated otherwise."""

    def likeness(piece: Piece) -> tuple[int, int | None]:
        tensor = piece.tensor
        return layout.tensors[tensor].group, None if tensor in absent else skipped.get(tensor, 0)

    starts = [(like, next(pieces).shard_start) for like, pieces in groupby(shard.pieces, key=likeness)]
    assert starts[0][1] == 0, "a shard starts with a tensor: padding ends where the next 64 bytes begin"
    ends = [*(start for _, start in starts[1:]), shard.numel]
    return [_Run(*like, start, end) for (like, start), end in zip(starts, ends, strict=True)]
