"""What the script gave as ``optimizer=`` and ``lr_scheduler=``: read once, then watched.

Servers apply what was read. A script that changes a number of its optimizer later is refused by name. It may go on
ticking its scheduler: ``scheduler.step()`` once after each ``worker.step()``, as in plain torch, and not at all, are
both right, because the job counts its steps itself. So the call computes nothing any more; it sets the rates of the
optimizer and ``get_last_lr()`` to the job's, also after a resume or a step back. Another rhythm, such as a tick a pass
over the data, would mean other rates than those that were read, and is refused at the first such call.

Used by the worker, in the thread that runs the script.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from psa_store.errors import UsageError
from psa_store.optim import Optimizer
from psa_store.optim.from_scheduler import rates_of
from psa_store.optim.from_torch import constant_rates, from_torch
from psa_store.worker.script import script_line
from psa_store.worker.shown_optimizer import ShownOptimizer


class GivenOptimizer:
    """``steps``: where the job ends, if it does."""

    optimizer: Optimizer
    """What servers apply when the job begins."""
    at: Callable[[int], Optimizer]
    """What they apply in a step; as the job knows it, once this worker is a member of it."""

    def __init__(self, optimizer: object, lr_scheduler: object, model: nn.Module | None, steps: int | None) -> None:
        self._shown: ShownOptimizer | None = None
        self._step = 0
        self._steps_since_tick = 0
        """That have ended since then; one counts once, for however many ranks it was computed here."""
        self._last_counted: int | None = None
        self._skips_since_tick = 0
        """Batches that were left out: they go with or without a tick."""
        self._skipping = False
        if isinstance(optimizer, torch.optim.Optimizer):
            if model is None:
                raise UsageError(
                    "optimizer: one of torch goes with a whole model; with stages give one of psa.optim, such as "
                    "psa.optim.AdamW(lr=1e-3)"
                )
            rates = constant_rates(optimizer) if lr_scheduler is None else rates_of(lr_scheduler, optimizer, steps)
            self.optimizer = from_torch(optimizer, model, rates)
            self._shown = ShownOptimizer(optimizer, lr_scheduler, rates)
        elif not isinstance(optimizer, Optimizer):
            raise UsageError(
                f"optimizer={optimizer!r}: give one of psa.optim, such as psa.optim.AdamW(lr=1e-3). Instead of two, "
                "give one with groups: parameters that get no gradient in a step are left out of it"
            )
        elif lr_scheduler is not None:
            raise UsageError(
                "lr_scheduler= goes with an optimizer of torch; to one of psa.optim give the schedule as its lr, such "
                "as lr=psa.optim.warmup_cosine(1e-3)"
            )
        else:
            self.optimizer = optimizer
        self.at = lambda step: self.optimizer

    def watched(self) -> AbstractContextManager[None]:
        """Take the scheduler's ticks while this lasts."""
        return nullcontext() if self._shown is None else self._shown.ticks_taken(self._tick)

    def begin(self, step: int) -> None:
        """Show the rates of a step, of which a batch comes.

        Raises:
            UsageError: the script has changed its optimizer since :meth:`end`.
        """
        if self._shown is not None:
            try:
                self._shown.check()
            except UsageError as error:
                raise UsageError(f"{script_line()}: {error}") from error
            self._step = step
            self._show(step)

    def end(self) -> None:
        """Count a batch that ends.

        Raises:
            UsageError: the script has changed its optimizer.
        """
        if self._shown is not None:
            self._shown.check()
        if self._skipping:
            self._skips_since_tick += 1
        elif self._step != self._last_counted:
            self._steps_since_tick += 1
            self._last_counted = self._step
        self._skipping = False

    def skip(self) -> None:
        """The batch that ends next is left out."""
        self._skipping = True

    def _show(self, step: int) -> None:
        assert self._shown is not None
        self._shown.show(self.at(step).lr_at(step), step)

    def _tick(self, with_arguments: bool) -> None:
        if with_arguments:
            raise UsageError(f"{script_line()}: scheduler.step() takes no argument here: a tick is one step of the job")
        if not self._steps_since_tick <= 1 <= self._steps_since_tick + self._skips_since_tick:
            raise UsageError(
                f"{script_line()}: scheduler.step() after {self._steps_since_tick} steps since the last one. The "
                "scheduler was given as lr_scheduler=, where a tick is one step: call it once after each, or not at "
                "all, and make it with numbers that count steps, such as StepLR(optimizer, 30 * len(loader))"
            )
        self._steps_since_tick = self._skips_since_tick = 0
        self._last_counted = None
        self._show(self._step + 1)
