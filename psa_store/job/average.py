"""An average of a job's parameters over its steps, as data: what users write as ``psa.ema(0.999)``.

After each update of a shard, servers bring the average nearer to the parameters: ``decay * average + (1 - decay) *
parameters``. It begins as the parameters after the first update, as ``torch.optim.swa_utils.AveragedModel`` does.

Pure: no I/O, no threads, no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from psa_store.errors import UsageError


@dataclass(frozen=True, slots=True)
class Average:
    """An exponential moving average; built by :func:`ema`."""

    decay: float

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float):
            raise UsageError(f"decay={self.decay!r}: must be a number")
        if not (math.isfinite(self.decay) and 0.0 <= self.decay < 1.0):
            raise UsageError(f"decay={self.decay!r}: must be at least 0 and less than 1")
        object.__setattr__(self, "decay", float(self.decay))


def ema(decay: float = 0.999) -> Average:
    """Average the parameters exponentially over the steps of a job; give it to :class:`psa_store.Worker`.

    Args:
        decay: what is left of the average after each update, at least 0 and less than 1.
    """
    return Average(decay)
