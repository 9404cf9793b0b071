"""An optimizer and a scheduler of torch, as servers apply them and as a script sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from psa_store.errors import UsageError
from psa_store.optim import Optimizer
from psa_store.optim.from_scheduler import Rates, rates_of
from psa_store.optim.from_torch import constant_rates, from_torch
from psa_store.optim.pieces import pieces_of
from psa_store.worker.shown_optimizer import ShownOptimizer


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
        self._tick_steps = tick_steps
        rates = constant_rates(optimizer) if scheduler is None else _rates(scheduler, optimizer, steps, tick_steps)
        self.rule: Optimizer = from_torch(optimizer, module, rates)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # or the scheduler warns that nothing steps it
        self._shown = ShownOptimizer(optimizer, scheduler, rates)

    def show(self, step: int, rate: float) -> None:
        """Set the rates to those of a step, which comes next."""
        self._shown.show(rate, step // self._tick_steps)

    def ticks_taken(self, show: Callable[[], None]) -> AbstractContextManager[None]:
        """Call ``show`` in place of the scheduler's ``step()`` while this lasts: it would compute other rates."""
        return self._shown.ticks_taken(lambda with_arguments: show())

    def check(self) -> None:
        """Raise UsageError if the script changed the optimizer since the rates were shown."""
        self._shown.check()


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
