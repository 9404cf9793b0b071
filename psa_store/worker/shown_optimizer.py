"""An optimizer of torch, and its scheduler, in whose place servers make the steps: they show the rates of the job.

So what a script, a progress bar or a logger reads there is what servers apply: also after a resume, a step back, and a
change by `psa job set`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from psa_store.optim.from_scheduler import Rates
from psa_store.optim.from_torch import numbers_of, refuse_change


class ShownOptimizer:
    """``scheduler``: of torch, or None; ``rates``: those that were read from both. Used in one thread."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any, rates: Rates) -> None:
        self._optimizer, self._scheduler, self._rates = optimizer, scheduler, rates
        self._numbers = numbers_of(optimizer)

    def show(self, rate: float, tick: int) -> None:
        """Set the rate of each group to its part of ``rate``, and the scheduler to the tick that gave it."""
        for group, scale, numbers in zip(
            self._optimizer.param_groups, self._rates.scales, self._numbers, strict=False
        ):  # a group that the script has added is named by check()
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * scale)
            else:
                group["lr"] = rate * scale
            numbers["lr"] = float(group["lr"])
        if self._scheduler is not None:
            self._scheduler.last_epoch = tick
            self._scheduler._last_lr = [rate * scale for scale in self._rates.scales]

    @contextmanager
    def ticks_taken(self, tick: Callable[[bool], None]) -> Iterator[None]:
        """Call ``tick`` in place of the scheduler's ``step()``, with whether that was given arguments."""
        if self._scheduler is None:
            yield
            return
        scheduler, kind = self._scheduler, type(self._scheduler)

        def step(_: object, *arguments: object, **named: object) -> None:
            tick(bool(arguments or named))

        # A class of its own, as the object's attributes are what it saves as its state.
        scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
        try:
            yield
        finally:
            scheduler.__class__ = kind

    def check(self) -> None:
        """Raise UsageError if the script has changed the optimizer since its rates were shown."""
        if (numbers := numbers_of(self._optimizer)) != self._numbers:
            refuse_change(self._numbers, numbers)
