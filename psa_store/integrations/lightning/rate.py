"""What ``configure_optimizers`` returned, as servers apply it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from psa_store.errors import UsageError
from psa_store.optim import Optimizer
from psa_store.optim.from_scheduler import Rates, rates_of
from psa_store.optim.from_torch import from_torch, numbers_of, refuse_change
from psa_store.optim.pieces import pieces_of


@dataclass(frozen=True, slots=True)
class Length:
    """``steps`` of the job, None for no end; ``epoch_steps`` of one pass over the data."""

    steps: int | None
    epoch_steps: int


class FollowedOptimizer:
    """The script's optimizer and scheduler: read once, then they show the job's rates.

    Raises:
        UsageError: servers know neither their like nor a schedule that gives these rates.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, configs: list[Any], module: Any, length: Length) -> None:
        if len(configs) > 1:
            raise UsageError("configure_optimizers: several schedulers; make one of them, such as a SequentialLR")
        self._optimizer = optimizer
        self._scheduler: Any = configs[0].scheduler if configs else None
        self._tick_steps = _tick_steps(configs[0], length) if configs else 1
        self._rates = _rates(self._scheduler, optimizer, length, self._tick_steps) if configs else None
        self.rule: Optimizer = from_torch(optimizer, module, self._rates)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # or the scheduler warns that nothing steps it
        self._numbers = numbers_of(optimizer)

    def show(self, step: int) -> None:
        """Set the rates to those of a step, which comes next; the Trainer's ticks may have set them as well."""
        if self._rates is None:
            return
        rate = self.rule.lr_at(step)
        for group, numbers, scale in zip(self._optimizer.param_groups, self._numbers, self._rates.scales, strict=True):
            group["lr"] = numbers["lr"] = rate * scale
        self._scheduler.last_epoch = step // self._tick_steps
        self._scheduler._last_lr = [group["lr"] for group in self._optimizer.param_groups]

    def check(self) -> None:
        """Raise UsageError if the script changed the optimizer since the rates were shown."""
        if (numbers := numbers_of(self._optimizer)) != self._numbers:
            refuse_change(self._numbers, numbers)


def _tick_steps(config: Any, length: Length) -> int:
    """Steps from one tick of the scheduler to the next."""
    if config.interval == "epoch":
        return int(length.epoch_steps * config.frequency)
    if config.frequency != 1:
        raise UsageError(f"lr_scheduler: frequency={config.frequency} of steps: make it with numbers that count steps")
    return 1


def _rates(scheduler: Any, optimizer: torch.optim.Optimizer, length: Length, tick_steps: int) -> Rates:
    if tick_steps == 1:
        return rates_of(scheduler, optimizer, length.steps)
    name = type(scheduler).__name__
    if length.steps is None:
        raise UsageError(f"lr_scheduler={name} by epochs: its rates are read ahead: give max_steps or max_epochs")
    rates = rates_of(scheduler, optimizer, math.ceil(length.steps / tick_steps))
    by_tick = rates.lr
    if isinstance(by_tick, float):
        return rates
    by_step = pieces_of([by_tick.at(step // tick_steps) for step in range(max(1, length.steps))])
    if by_step is None:
        raise UsageError(f"lr_scheduler={name}: its rates take too many pieces: make it with interval 'step'")
    return replace(rates, lr=by_step)
