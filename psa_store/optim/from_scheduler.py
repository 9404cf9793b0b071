"""``torch.optim.lr_scheduler`` objects, taken as what they say: the rate of each step, one tick a step.

A copy of the scheduler is ticked on an optimizer of a single number; the script's own objects are left alone. A class
that has a formula is stored as that, with the object's numbers, and the first ticks confirm it. The rates of others are
stored as pieces: of one period if they repeat, else of all steps of the job.

Pure.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import lr_scheduler as theirs

from psa_store.errors import UsageError
from psa_store.optim.pieces import PIECES_MAX, pieces_of, round_rate
from psa_store.optim.schedule import Polynomial, Schedule
from psa_store.optim.schedules import POINTS_MAX, Exponential, Milestones, OneCycle, StepDecay, Table

TICKS_CONFIRMED = 2000
"""A formula is compared with so many ticks."""
_SAME = 1e-7
"""Rates are the same if they differ by less, relatively: float32 does not tell them apart."""


@dataclass(frozen=True, slots=True)
class Rates:
    """``scales``: by the optimizer's groups, what multiplies the rate; the largest is 1."""

    lr: float | Schedule
    scales: Sequence[float]


def rates_of(scheduler: object, optimizer: torch.optim.Optimizer, steps: int | None) -> Rates:
    """The rates of ``optimizer`` when ``scheduler`` is ticked once a step, from the start, for ``steps``.

    Raises:
        UsageError: another class than torch's own, one whose rates depend on more than the step or that changes more
            than rates, one that was ticked before, or groups whose rates are in no constant proportion.
    """
    name = type(scheduler).__name__
    for each in _all_of(scheduler):
        _check_class(each)
    assert isinstance(scheduler, theirs.LRScheduler)
    if scheduler.optimizer is not optimizer:
        raise UsageError(f"lr_scheduler={name}: it is made of another optimizer than the one given to psa.Worker")
    if any(getattr(each, "last_epoch", 0) > 0 for each in _all_of(scheduler)):
        raise UsageError(
            f"lr_scheduler={name}: it has been ticked already. A job counts its steps itself, also when it goes on: "
            "make the scheduler without last_epoch and do not load its state"
        )
    last = getattr(scheduler, "total_steps", None)
    if steps is not None and last is not None and steps > last:
        raise UsageError(f"lr_scheduler={name}: it ends after {last} steps, and the job after {steps}")
    known = _formula(scheduler, steps)
    return _sampled(scheduler, steps) if known is None else known


def _formula(scheduler: theirs.LRScheduler, steps: int | None) -> Rates | None:
    """The rates of a class that has a formula, if its first ticks confirm it."""
    formula = _FORMULAS.get(type(scheduler))
    if formula is None:
        return None
    ticks = TICKS_CONFIRMED if steps is None else min(steps, TICKS_CONFIRMED)
    rates = _tick(scheduler, min(ticks + 1, getattr(scheduler, "total_steps", ticks + 1)))
    base, scales = _proportions(type(scheduler).__name__, rates)
    known = formula(scheduler, float(scheduler.base_lrs[base]))
    if known is None or not all(_same(known.at(tick), groups[base]) for tick, groups in enumerate(rates)):
        return None
    return Rates(known, scales)


def _sampled(scheduler: theirs.LRScheduler, steps: int | None) -> Rates:
    name = type(scheduler).__name__
    period = _period(scheduler)
    after_the_last = None if steps is None else steps + 1  # the script ticks once more after the last step
    ticks = period or getattr(scheduler, "total_steps", after_the_last)
    if ticks is None:
        raise UsageError(f"lr_scheduler={name}: its rates are read ahead, so say how many: psa.Worker(…, steps=…)")
    rates = _tick(scheduler, ticks)
    base, scales = _proportions(name, rates)
    pieces = pieces_of([groups[base] for groups in rates])
    if pieces is None:
        raise UsageError(
            f"lr_scheduler={name}: its rates over {ticks} steps follow no rule that {PIECES_MAX} pieces can tell; "
            f"write psa.optim with lr=psa.optim.table(…), which takes up to {POINTS_MAX} points"
        )
    return Rates(replace(pieces, total=period, repeats=True) if period else pieces, scales)


def _all_of(scheduler: object) -> Iterator[object]:
    """The scheduler, and those that it is made of."""
    yield scheduler
    if type(scheduler) in (theirs.SequentialLR, theirs.ChainedScheduler):
        for each in scheduler._schedulers:  # type: ignore[attr-defined]
            yield from _all_of(each)


def _check_class(scheduler: object) -> None:
    name = type(scheduler).__name__
    if getattr(scheduler, "cycle_momentum", False):
        raise UsageError(
            f"lr_scheduler={name}: it changes the momentum, too, and servers change rates only: make it with "
            "cycle_momentum=False"
        )
    if type(scheduler) in _KNOWN:
        return
    if isinstance(scheduler, theirs.ReduceLROnPlateau):
        raise UsageError(
            f"lr_scheduler={name}: its rates depend on results, and servers know those of a step before it is made; "
            "use one that depends on the step, such as CosineAnnealingLR, or lower the rate by worker.change(lr=…)"
        )
    known = ", ".join(each.__name__ for each in _KNOWN)
    raise UsageError(
        f"lr_scheduler={name}: it is none of torch's that depend on the step alone ({known}); write it as "
        "torch.optim.lr_scheduler.LambdaLR(optimizer, function of the step), or as a schedule of psa.optim"
    )


def _tick(scheduler: theirs.LRScheduler, ticks: int) -> list[list[float]]:
    """The rates of the groups, from those before the first tick on."""
    name = type(scheduler).__name__
    stand_in = _stand_in(scheduler.optimizer)
    functions = [f for each in _all_of(scheduler) for f in getattr(each, "lr_lambdas", ())]
    # Functions are not copied: one may be a method of whatever the script has.
    memo: dict[int, Any] = {id(scheduler.optimizer): stand_in, **{id(f): f for f in functions}}
    scheduler = copy.deepcopy(scheduler, memo)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the stand-in made no step
        for tick in range(ticks):
            if tick > 0:
                try:
                    scheduler.step()
                except ValueError as error:
                    raise UsageError(f"lr_scheduler={name}: it ends after {tick} of {ticks} steps: {error}") from error
            rates.append([float(each["lr"]) for each in stand_in.param_groups])
    if any(not 0.0 <= rate < float("inf") for group in rates for rate in group):
        raise UsageError(f"lr_scheduler={name}: some of its rates are less than 0 or no numbers")
    return rates


def _stand_in(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer with the same groups, of a single number."""
    single = torch.nn.Parameter(torch.zeros(1))
    stand_in = torch.optim.SGD([single])
    stand_in.defaults = dict(optimizer.defaults)
    stand_in.param_groups = [
        {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in {**each, "params": [single]}.items()
        }
        for each in optimizer.param_groups
    ]
    return stand_in


def _proportions(name: str, rates: Sequence[Sequence[float]]) -> tuple[int, list[float]]:
    """The group with the largest rate, and by group the constant share of that."""
    top = max(rates, key=max)
    base = top.index(max(top))
    scales = [round_rate(each / top[base]) if top[base] > 0.0 else 1.0 for each in top]
    for tick, groups in enumerate(rates):
        for group, (rate, scale) in enumerate(zip(groups, scales, strict=True)):
            if not _same(groups[base] * scale, rate):
                raise UsageError(
                    f"lr_scheduler={name}: the rates of groups {base} and {group} are in another proportion at step "
                    f"{tick} than before, and servers know one schedule for all: give groups the same function, with a "
                    "rate of their own to begin with"
                )
    return base, scales


def _same(rate: float, other: float) -> bool:
    return abs(rate - other) <= _SAME * max(rate, other) + 1e-15


def _period(scheduler: theirs.LRScheduler) -> int | None:
    """Ticks after which the rates come again, for ever."""
    match scheduler:
        case theirs.CosineAnnealingLR(T_max=half):
            return 2 * half
        case theirs.CosineAnnealingWarmRestarts(T_0=cycle, T_mult=1):
            return cycle
        case theirs.CyclicLR(mode="triangular", total_size=size) if size == int(size):
            return None if scheduler._scale_fn_custom is not None else int(size)
    return None


def _constant(s: Any, base: float) -> Schedule | None:
    return Table(((0, base * s.factor), (s.total_iters, base)), "hold") if s.total_iters > 0 else None


def _linear(s: Any, base: float) -> Schedule | None:
    points = ((0, base * s.start_factor), (s.total_iters, base * s.end_factor))
    return Table(points, "linear") if s.total_iters > 0 else None


def _polynomial(s: Any, base: float) -> Schedule | None:
    return Polynomial(base, 0, s.total_iters, 0.0, s.power) if s.total_iters > 0 else None


def _one_cycle(s: Any, base: float) -> Schedule | None:
    if s._anneal_func_type != "cos" or len(s._schedule_phases) != 2 or s.total_steps < 2:
        return None
    group = next(each for each in s.optimizer.param_groups if float(each["initial_lr"]) == base)
    rise = (s._schedule_phases[0]["end_step"] + 1) / s.total_steps
    return OneCycle(float(group["max_lr"]), s.total_steps, rise, base, float(group["min_lr"])) if rise < 1.0 else None


_FORMULAS: Mapping[type, Callable[[Any, float], Schedule | None]] = {
    theirs.ConstantLR: _constant,
    theirs.LinearLR: _linear,
    theirs.StepLR: lambda s, base: StepDecay(base, s.step_size, s.gamma),
    theirs.MultiStepLR: lambda s, base: Milestones(base, sorted(s.milestones.elements()), s.gamma),
    theirs.ExponentialLR: lambda s, base: Exponential(base, s.gamma),
    theirs.PolynomialLR: _polynomial,
    theirs.OneCycleLR: _one_cycle,
}
_KNOWN = (
    *_FORMULAS,
    theirs.CosineAnnealingLR,
    theirs.CosineAnnealingWarmRestarts,
    theirs.CyclicLR,
    theirs.LambdaLR,
    theirs.MultiplicativeLR,
    theirs.SequentialLR,
    theirs.ChainedScheduler,
)
