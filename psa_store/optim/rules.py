"""The rules of the optimizers: how one update changes parameters and state, given the gradient. Used by kernels only.

A rule is handed all runs of one group in one block, and works element by element: what becomes of an element depends on
the element, its gradient, its state and the :class:`Moment` only. A zero gradient on a zero parameter with zero state
gives a zero update: padding stays zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from psa_store.optim.spec import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

State = Mapping[str, list[Tensor]]
"""Slot name -> its runs, parallel to the runs of the parameters."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What changes from one update to the next.

    ``divisor``: of the gradient, still to be applied; less than 0 to climb. ``opt_step``: updates before this one.
    """

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
        state["max_exp_avg_sq"] if o.amsgrad else [],
        _steps(now, params),
        lr=now.lr,
        beta1=o.betas[0],
        beta2=o.betas[1],
        weight_decay=o.weight_decay,
        eps=o.eps,
        amsgrad=o.amsgrad,
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
    return [_scalar(float(now.opt_step + 1))] * len(params)


def _divisor(now: Moment) -> Tensor | None:
    """What the fused kernels divide the gradient by, in the same pass."""
    return None if now.divisor == 1.0 else _scalar(now.divisor)


@lru_cache(maxsize=64)
def _scalar(value: float) -> Tensor:
    """A number as the fused kernels want it, which only read it: one for all blocks of a step."""
    return torch.tensor(value, dtype=torch.float32)


_Run = Callable[[Any, Moment, Tensor, Tensor, Mapping[str, Tensor]], None]


def _run_by_run(update: _Run) -> Rule:
    """A rule in several passes, for what torch has no fused kernel for. The gradient may be overwritten."""

    def rule(o: Optimizer, now: Moment, params: list[Tensor], grads: list[Tensor], state: State) -> None:
        assert now.divisor == 1.0
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            update(o, now, param, grad, {name: runs[i] for name, runs in state.items()})

    return rule


def _decay(o: Optimizer, now: Moment, param: Tensor, grad: Tensor, *, decoupled: bool = False) -> None:
    if o.weight_decay == 0.0:
        return
    if decoupled:
        param.mul_(1.0 - now.lr * o.weight_decay)
    else:
        grad.add_(param, alpha=o.weight_decay)


def _rmsprop(o: RMSprop, now: Moment, param: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
    square_avg, avg = state["square_avg"], torch.empty_like(param)
    _decay(o, now, param, grad)
    square_avg.mul_(o.alpha).addcmul_(grad, grad, value=1.0 - o.alpha)
    if o.centered:
        grad_avg = state["grad_avg"].lerp_(grad, 1.0 - o.alpha)
        torch.addcmul(square_avg, grad_avg, grad_avg, value=-1.0, out=avg).sqrt_()
    else:
        torch.sqrt(square_avg, out=avg)
    avg.add_(o.eps)
    if o.momentum > 0.0:
        param.add_(state["momentum_buffer"].mul_(o.momentum).addcdiv_(grad, avg), alpha=-now.lr)
    else:
        param.addcdiv_(grad, avg, value=-now.lr)


def _nadam(o: NAdam, now: Moment, param: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
    step = now.opt_step + 1
    mu, mu_next = _momentum(o.betas[0], o.momentum_decay, step), _momentum(o.betas[0], o.momentum_decay, step + 1)
    product = _momentum_product(o.betas[0], o.momentum_decay, step)
    _decay(o, now, param, grad, decoupled=o.decoupled_weight_decay)
    exp_avg, exp_avg_sq = _means(o.betas, grad, state)
    denominator = exp_avg_sq.div(1.0 - o.betas[1] ** step).sqrt_().add_(o.eps)
    param.addcdiv_(grad, denominator, value=-now.lr * (1.0 - mu) / (1.0 - product))
    param.addcdiv_(exp_avg, denominator, value=-now.lr * mu_next / (1.0 - product * mu_next))


def _momentum(beta: float, decay: float, step: int) -> float:
    """NAdam's momentum at an update, counted from 1."""
    return beta * (1.0 - 0.5 * math.pow(0.96, step * decay))


@lru_cache(maxsize=64)
def _momentum_product(beta: float, decay: float, step: int) -> float:
    """The product of NAdam's momentum over all updates up to this one: state in torch, here a function of the step.

    Once it is too small to change ``1 - product`` it counts as 0, so that no update has to multiply for long.
    """
    product = 1.0
    for each in range(1, step + 1):
        product *= _momentum(beta, decay, each)
        if product < 2.0**-54:
            return 0.0
    return product


def _radam(o: RAdam, now: Moment, param: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
    step = now.opt_step + 1
    _decay(o, now, param, grad, decoupled=o.decoupled_weight_decay)
    exp_avg, exp_avg_sq = _means(o.betas, grad, state)
    rate = now.lr / (1.0 - o.betas[0] ** step)
    unbiased = 1.0 - o.betas[1] ** step
    longest = 2.0 / (1.0 - o.betas[1]) - 1.0
    length = longest - 2.0 * step * o.betas[1] ** step / unbiased
    if length <= 5.0:  # too few gradients to know their variance by
        param.add_(exp_avg, alpha=-rate)
        return
    rectified = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
    param.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(o.eps), value=-rate * math.sqrt(rectified * unbiased))


def _means(betas: Sequence[float], grad: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Adam's running means of the gradient and of its square, this gradient included."""
    exp_avg = state["exp_avg"].lerp_(grad, 1.0 - betas[0])
    exp_avg_sq = state["exp_avg_sq"].mul_(betas[1]).addcmul_(grad, grad, value=1.0 - betas[1])
    return exp_avg, exp_avg_sq


def _adamax(o: Adamax, now: Moment, param: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
    """As torch, where an ``exp_inf`` is at least ``eps``; here it is 0 where no gradient ever was: padding is such."""
    _decay(o, now, param, grad)
    exp_avg = state["exp_avg"].lerp_(grad, 1.0 - o.betas[0])
    size = grad.abs_()
    size.add_(size.sign(), alpha=o.eps)
    exp_inf = torch.maximum(state["exp_inf"].mul_(o.betas[1]), size, out=state["exp_inf"])
    rate = now.lr / (1.0 - o.betas[0] ** (now.opt_step + 1))
    param.addcdiv_(exp_avg, exp_inf.clamp(min=o.eps), value=-rate)


def _adadelta(o: Adadelta, now: Moment, param: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
    square_avg, acc_delta = state["square_avg"], state["acc_delta"]
    _decay(o, now, param, grad)
    square_avg.mul_(o.rho).addcmul_(grad, grad, value=1.0 - o.rho)
    delta = acc_delta.add(o.eps).sqrt_().div_(square_avg.add(o.eps).sqrt_()).mul_(grad)
    acc_delta.mul_(o.rho).addcmul_(delta, delta, value=1.0 - o.rho)
    param.add_(delta, alpha=-now.lr)


def _lion(o: Lion, now: Moment, param: Tensor, grad: Tensor, state: Mapping[str, Tensor]) -> None:
    exp_avg = state["exp_avg"]
    _decay(o, now, param, grad, decoupled=True)
    param.add_(exp_avg.mul(o.betas[0]).add_(grad, alpha=1.0 - o.betas[0]).sign_(), alpha=-now.lr)
    exp_avg.mul_(o.betas[1]).add_(grad, alpha=1.0 - o.betas[1])


DIVIDING = (SGD, Adam, Adagrad)
"""Optimizers whose kernel can divide the gradient in passing, in float32."""

RULES: Mapping[type[Optimizer], Rule] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    Adagrad: _adagrad,
    RMSprop: _run_by_run(_rmsprop),
    NAdam: _run_by_run(_nadam),
    RAdam: _run_by_run(_radam),
    Adamax: _run_by_run(_adamax),
    Adadelta: _run_by_run(_adadelta),
    Lion: _run_by_run(_lion),
}
