"""The rules of the optimizers: how one update changes parameters and state, given the gradient. Used by kernels only.

A rule is handed all runs of one group in one block, and works element by element: what becomes of an element depends on
the element, its gradient, its state and the :class:`Moment` only. A zero gradient on a zero parameter with zero state
gives a zero update: padding stays zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_store.optim.spec import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

State = Mapping[str, list[Tensor]]
"""Slot name -> its runs, parallel to the runs of the parameters."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What changes from one update to the next. ``divisor``: of the gradient, still to be applied."""

    lr: float
    opt_step: int
    divisor: float


Rule = Callable[[Optimizer, Moment, list[Tensor], list[Tensor], State], None]
"""(optimizer with a group's overrides, moment, parameters, gradients, state), updates in place."""


def _sgd(o: Optimizer, now: Moment, params: list[Tensor], grads: list[Tensor], state: State) -> None:
    assert isinstance(o, SGD)
    torch._fused_sgd_(
        params,
        grads,
        state["momentum_buffer"] if o.momentum > 0.0 else [],
        weight_decay=o.weight_decay,
        momentum=o.momentum,
        lr=now.lr,
        dampening=o.dampening,
        nesterov=o.nesterov,
        maximize=False,
        is_first_step=now.opt_step == 0,
        grad_scale=_divisor(now),
    )


def _adam(o: Optimizer, now: Moment, params: list[Tensor], grads: list[Tensor], state: State) -> None:
    assert isinstance(o, Adam)
    fused = torch._fused_adamw_ if isinstance(o, AdamW) else torch._fused_adam_
    fused(
        params,
        grads,
        state["exp_avg"],
        state["exp_avg_sq"],
        [],
        _steps(now, params),
        lr=now.lr,
        beta1=o.betas[0],
        beta2=o.betas[1],
        weight_decay=o.weight_decay,
        eps=o.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=_divisor(now),
    )


def _adagrad(o: Optimizer, now: Moment, params: list[Tensor], grads: list[Tensor], state: State) -> None:
    assert isinstance(o, Adagrad)
    torch._fused_adagrad_(
        params,
        grads,
        state["sum"],
        _steps(now, params),
        lr=now.lr,
        lr_decay=o.lr_decay,
        weight_decay=o.weight_decay,
        eps=o.eps,
        maximize=False,
        grad_scale=_divisor(now),
    )


def _steps(now: Moment, params: list[Tensor]) -> list[Tensor]:
    """The number of this update as the fused kernels want it: one tensor per run, counted from 1."""
    return [torch.tensor(float(now.opt_step + 1))] * len(params)


def _divisor(now: Moment) -> Tensor | None:
    """What the fused kernels divide the gradient by, in the same pass."""
    return None if now.divisor == 1.0 else torch.tensor(now.divisor)


def _rmsprop(o: Optimizer, now: Moment, params: list[Tensor], grads: list[Tensor], state: State) -> None:
    """In several passes, as torch has no fused kernel for it."""
    assert isinstance(o, RMSprop) and now.divisor == 1.0
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        _rmsprop_run(o, now.lr, param, grad, {name: runs[i] for name, runs in state.items()})


def _rmsprop_run(o: RMSprop, lr: float, param: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
    square_avg, avg = state["square_avg"], torch.empty_like(param)
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


DIVIDING = (SGD, Adam, Adagrad)
"""Optimizers whose kernel can divide the gradient in passing, in float32."""

RULES: Mapping[type[Optimizer], Rule] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    Adagrad: _adagrad,
    RMSprop: _rmsprop,
}
