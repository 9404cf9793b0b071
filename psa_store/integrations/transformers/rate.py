"""Schedules of transformers as servers apply them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from psa_store.errors import UsageError
from psa_store.optim import Schedule
from psa_store.optim.pieces import pieces_of


class FollowedRate:
    """What callbacks may ask of ``lr_scheduler``: servers follow the schedule, this tells its rate."""

    def __init__(self, rate: Callable[[], float]) -> None:
        self._rate = rate

    def get_last_lr(self) -> list[float]:
        """The rate of the coming step."""
        return [self._rate()]


def schedule_of(scheduler: Any, base: float, steps: int) -> Schedule:
    """The rates of a scheduler of transformers, which are functions of the step, as servers apply them.

    Raises:
        UsageError: its rates depend on something else.
    """
    name = type(scheduler).__name__
    lambdas = scheduler.lr_lambdas if type(scheduler) is LambdaLR else []
    if not lambdas or any(each(step) != lambdas[0](step) for each in lambdas[1:] for step in range(0, steps, 97)):
        raise UsageError(
            f"lr_scheduler {name}: servers need a rate that is one function of the step, such as those of "
            "lr_scheduler_type linear, cosine, constant_with_warmup, polynomial, inverse_sqrt, warmup_stable_decay"
        )
    found = pieces_of([base * lambdas[0](step) for step in range(max(1, steps))])
    if found is None:
        raise UsageError(f"lr_scheduler {name}: its rates take too many pieces; give one that changes less often")
    return found
