"""Applying an optimizer to one shard: flat tensors in, the same tensors updated in place. Used by servers.

Promises:

* The semantics of ``torch.optim``, parameter by parameter, with no loop over parameters: neighbours of one
  group are updated as one run, the padding between them included. Padding is zero and stays zero under every
  optimizer here, because a zero gradient on a zero parameter gives a zero update (``eps`` is never 0, see
  ``spec.EPS_MIN``).
* The same bits on every run. An element's bits depend on the element, its state and the step only: every run
  starts and ends on a multiple of 64 bytes, so that no element is ever left to the scalar tail of a vector
  loop. Servers call ``torch.set_num_threads(1)`` and work on several shards at a time instead; kernels of
  different shards share nothing.

Half-precision parameters have a float32 ``master`` copy and float32 state; the parameter is that, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from psa_store.layout import Layout, Shard
from psa_store.optim.spec import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

MASTER = "master"
BLOCK_ELEMENTS = 1 << 16
"""Updates of several passes go block by block, so that all but the first pass read from the cache."""

_HALF = frozenset({"bfloat16", "float16"})

State = Mapping[str, list[Tensor]]
"""Slot name -> its runs, parallel to the runs of the parameters."""


def slot_names(optimizer: Optimizer, dtype: str) -> tuple[str, ...]:
    """Names of the flat arrays that a shard has beside its parameters, in the order they are stored in."""
    master = (MASTER,) if dtype in _HALF else ()
    return master + _state_names(optimizer)


def slot_dtype(optimizer: Optimizer, dtype: str) -> dict[str, str]:
    """The dtype of each slot of a shard of the given dtype."""
    wide = "float32" if dtype in _HALF else dtype
    return dict.fromkeys(slot_names(optimizer, dtype), wide)


def init_slots(optimizer: Optimizer, param: Tensor, shard: Shard, layout: Layout) -> dict[str, Tensor]:
    """The slots of a shard before its first update. ``param``: its parameters, 1-D, padding included."""
    dtypes = slot_dtype(optimizer, shard.dtype)
    slots = {name: torch.zeros(shard.numel, dtype=getattr(torch, dtype)) for name, dtype in dtypes.items()}
    if MASTER in slots:
        slots[MASTER].copy_(param)
    if isinstance(optimizer, Adagrad):
        for piece in shard.pieces:
            start = piece.shard_start
            slots["sum"][start : start + piece.length] = optimizer.initial_accumulator_value
    return slots


class ShardKernel:
    """Updates one shard in place. One thread at a time per shard; different shards are independent.

    ``param`` and ``slots`` are contiguous 1-D tensors of ``shard.numel`` elements, and stay the caller's.
    """

    def __init__(
        self, optimizer: Optimizer, layout: Layout, shard: Shard, param: Tensor, slots: Mapping[str, Tensor]
    ) -> None:
        dtypes = slot_dtype(optimizer, shard.dtype)
        assert slots.keys() == dtypes.keys()
        assert all(str(slots[name].dtype) == f"torch.{dtype}" for name, dtype in dtypes.items())
        assert all(t.is_contiguous() and t.shape == (shard.numel,) for t in (param, *slots.values()))
        self._optimizer = optimizer
        self._param = param
        self._master = slots.get(MASTER, param)
        groups, self._lengths = _runs(layout, shard)
        state = {name: slots[name].split_with_sizes(self._lengths) for name in _state_names(optimizer)}
        params = self._master.split_with_sizes(self._lengths)
        self._parts = [
            _Part.of(optimizer, group, [i for i, g in enumerate(groups) if g == group], params, state)
            for group in sorted(set(groups))
        ]

    def apply(self, grad: Tensor, *, step: int, opt_step: int, grad_scale: float) -> None:
        """Apply one update.

        Args:
            grad: the shard's mean gradient, 1-D, zero in the padding, float64 for float64 shards and float32
                for all others. Its contents are used up.
            step: the step, for the learning-rate schedule.
            opt_step: updates applied before this one, for Adam's bias correction and SGD's first step.
            grad_scale: multiplies the gradient; the factor of ``clip_grad_norm``, or 1.0.
        """
        assert grad.dtype is self._master.dtype and grad.shape == self._master.shape
        if grad_scale != 1.0:
            # Not the fused kernels' own grad_scale: it divides, and saves 1 ms of 17 for 25 M floats.
            grad.mul_(grad_scale)
        grads = grad.split_with_sizes(self._lengths)
        for part in self._parts:
            lr = self._optimizer.lr_at(step, part.group)
            part.rule(part.optimizer, lr, opt_step, part.params, [grads[i] for i in part.runs], part.state)
        if self._master is not self._param:
            self._param.copy_(self._master)


Rule = Callable[[Optimizer, float, int, list[Tensor], list[Tensor], State], None]
"""(optimizer with a group's overrides, lr, opt_step, parameters, gradients, state), updates in place."""


@dataclass(frozen=True, slots=True)
class _Part:
    """All runs of one group in one shard, ready to be updated by one call."""

    group: int
    optimizer: Optimizer
    rule: Rule
    runs: Sequence[int]
    params: list[Tensor]
    state: State

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        group: int,
        runs: Sequence[int],
        params: Sequence[Tensor],
        state: Mapping[str, Sequence[Tensor]],
    ) -> _Part:
        own = {name: [tensors[i] for i in runs] for name, tensors in state.items()}
        rule = _RULES[type(optimizer)]
        return cls(group, optimizer.in_group(group), rule, runs, [params[i] for i in runs], own)


def _runs(layout: Layout, shard: Shard) -> tuple[list[int], list[int]]:
    """Groups and lengths of the runs that tile a shard; a run ends where a piece of another group starts."""
    groups: list[int] = []
    starts: list[int] = []
    for group, pieces in groupby(shard.pieces, key=lambda piece: layout.tensors[piece.tensor].group):
        groups.append(group)
        starts.append(next(pieces).shard_start)
    assert starts[0] == 0, "a shard starts with a tensor: padding ends where the next 64 bytes begin"
    ends = [*starts[1:], shard.numel]
    return groups, [end - start for start, end in zip(starts, ends, strict=True)]


def _state_names(optimizer: Optimizer) -> tuple[str, ...]:
    """As torch.optim names them; an array exists if any group needs it."""
    match optimizer:
        case SGD():
            return ("momentum_buffer",) if _has_momentum(optimizer) else ()
        case Adam():
            return ("exp_avg", "exp_avg_sq")
        case Adagrad():
            return ("sum",)
        case RMSprop():
            average = ("grad_avg",) if optimizer.centered else ()
            momentum = ("momentum_buffer",) if _has_momentum(optimizer) else ()
            return ("square_avg", *average, *momentum)
    raise AssertionError(f"no kernel for {type(optimizer).__name__}")


def _has_momentum(optimizer: SGD | RMSprop) -> bool:
    return any(optimizer.in_group(group).momentum > 0.0 for group in range(len(optimizer.groups) + 1))


def _sgd(o: Optimizer, lr: float, opt_step: int, params: list[Tensor], grads: list[Tensor], state: State) -> None:
    assert isinstance(o, SGD)
    torch._fused_sgd_(
        params,
        grads,
        state["momentum_buffer"] if o.momentum > 0.0 else [],
        weight_decay=o.weight_decay,
        momentum=o.momentum,
        lr=lr,
        dampening=o.dampening,
        nesterov=o.nesterov,
        maximize=False,
        is_first_step=opt_step == 0,
    )


def _adam(o: Optimizer, lr: float, opt_step: int, params: list[Tensor], grads: list[Tensor], state: State) -> None:
    assert isinstance(o, Adam)
    fused = torch._fused_adamw_ if isinstance(o, AdamW) else torch._fused_adam_
    fused(
        params,
        grads,
        state["exp_avg"],
        state["exp_avg_sq"],
        [],
        _steps(opt_step, params),
        lr=lr,
        beta1=o.betas[0],
        beta2=o.betas[1],
        weight_decay=o.weight_decay,
        eps=o.eps,
        amsgrad=False,
        maximize=False,
    )


def _adagrad(o: Optimizer, lr: float, opt_step: int, params: list[Tensor], grads: list[Tensor], state: State) -> None:
    assert isinstance(o, Adagrad)
    torch._fused_adagrad_(
        params,
        grads,
        state["sum"],
        _steps(opt_step, params),
        lr=lr,
        lr_decay=o.lr_decay,
        weight_decay=o.weight_decay,
        eps=o.eps,
        maximize=False,
    )


def _steps(opt_step: int, params: list[Tensor]) -> list[Tensor]:
    """The number of this update as the fused kernels want it: one tensor per run, counted from 1."""
    return [torch.tensor(float(opt_step + 1))] * len(params)


def _rmsprop(o: Optimizer, lr: float, opt_step: int, params: list[Tensor], grads: list[Tensor], state: State) -> None:
    """Block by block, as torch has no fused kernel for it."""
    assert isinstance(o, RMSprop)
    names = _state_names(o)
    scratch = torch.empty(BLOCK_ELEMENTS, dtype=params[0].dtype)
    for param, grad, *arrays in zip(params, grads, *(state[name] for name in names), strict=True):
        for low in range(0, param.numel(), BLOCK_ELEMENTS):
            block = slice(low, low + BLOCK_ELEMENTS)
            own = {name: array[block] for name, array in zip(names, arrays, strict=True)}
            _rmsprop_block(o, lr, param[block], grad[block], own, scratch)


def _rmsprop_block(
    o: RMSprop, lr: float, param: Tensor, grad: Tensor, state: Mapping[str, Tensor], scratch: Tensor
) -> None:
    square_avg, avg = state["square_avg"], scratch[: param.numel()]
    if o.weight_decay != 0.0:
        grad.add_(param, alpha=o.weight_decay)
    square_avg.mul_(o.alpha).addcmul_(grad, grad, value=1.0 - o.alpha)
    if o.centered:
        grad_avg = state["grad_avg"].lerp_(grad, 1.0 - o.alpha)
        torch.addcmul(square_avg, grad_avg, grad_avg, value=-1.0, out=avg).sqrt_()
    else:
        torch.sqrt(square_avg, out=avg)
    avg.add_(o.eps)
    if o.momentum > 0.0:
        param.add_(state["momentum_buffer"].mul_(o.momentum).addcdiv_(grad, avg), alpha=-lr)
    else:
        param.addcdiv_(grad, avg, value=-lr)


_RULES: Mapping[type[Optimizer], Rule] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    Adagrad: _adagrad,
    RMSprop: _rmsprop,
}
