"""An optimizer and a scheduler of torch, as servers apply them and as a script sees them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from psa_store.errors import UsageError
from psa_store.optim import Optimizer
from psa_store.optim.from_scheduler import Rates, rates_of
from psa_store.optim.from_torch import from_torch, numbers_of, refuse_change
from psa_store.optim.pieces import pieces_of


class FollowedOptimizer:
    """The script's optimizer and scheduler: read once, then they show the job's rates.

    Args:
        steps: of the job; None: it has no end.
        tick_steps: steps from one tick of the scheduler to the next.

    Raises:
        UsageError: servers know neither their like nor a schedule that gives these rates.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        module: torch.nn.Module,
        steps: int | None,
        tick_steps: int = 1,
    ) -> None:
        self._optimizer, self._scheduler, self._tick_steps = optimizer, scheduler, tick_steps
        self._rates = None if scheduler is None else _rates(scheduler, optimizer, steps, tick_steps)
        self.rule: Optimizer = from_torch(optimizer, module, self._rates)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # or the scheduler warns that nothing steps it
        self._numbers = numbers_of(optimizer)

    def show(self, step: int) -> None:
        """Set the rates to those of a step, which comes next; ticks of the scheduler may have set them as well."""
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


def _rates(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int | None, tick_steps: int) -> Rates:
    if tick_steps == 1:
        return rates_of(scheduler, optimizer, steps)
    name = type(scheduler).__name__
    if steps is None:
        raise UsageError(f"lr_scheduler={name} by epochs: its rates are read ahead: give max_steps or max_epochs")
    rates = rates_of(scheduler, optimizer, math.ceil(steps / tick_steps))
    by_tick = rates.lr
    if isinstance(by_tick, float):
        return rates
    by_step = pieces_of([by_tick.at(step // tick_steps) for step in range(max(1, steps))])
    if by_step is None:
        raise UsageError(f"lr_scheduler={name}: its rates take too many pieces: make it with interval 'step'")
    return replace(rates, lr=by_step)
