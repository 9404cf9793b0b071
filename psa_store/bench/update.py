"""The optimizer of contenders that are not psa: torch's own kernels, on flat memory, in the calling thread."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from psa_store.bench.request import Rule
from psa_store.bench.workload import BETAS, EPS, WEIGHT_DECAY, Workload, clip_factor

_NORM_ELEMENTS = 256 << 10


class Update:
    """Updates ``parameters`` in place. AdamW's moments are its own."""

    def __init__(self, workload: Workload, parameters: Tensor) -> None:
        self._workload = workload
        self._parameters = parameters
        if workload.rule is Rule.ADAMW:
            self._average, self._average_square = torch.zeros_like(parameters), torch.zeros_like(parameters)
            self._step = torch.zeros(())

    def apply(self, gradient: Tensor, scale: float) -> None:
        """Apply ``gradient * scale``. AdamW leaves the scaled gradient in ``gradient``, SGD leaves it alone."""
        lr = self._workload.lr
        if self._workload.rule is Rule.SGD:
            self._parameters.add_(gradient, alpha=-lr * scale)
            return
        adamw(
            [self._parameters],
            [gradient.mul_(scale)],
            [self._average],
            [self._average_square],
            [],
            [self._step],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=WEIGHT_DECAY,
            eps=EPS,
            maximize=False,
        )


def mean_scale(workload: Workload, totals: Sequence[Tensor], divisor: float) -> float:
    """Return what turns a sum of gradients, in any number of pieces, into their mean, clipped as the workload says."""
    if workload.clip is None:
        return 1.0 / divisor
    # One float32 norm of 25 M elements is a thousandth too small: AdamW shows that where a gradient is as small as EPS.
    blocks = [total[low : low + _NORM_ELEMENTS] for total in totals for low in range(0, len(total), _NORM_ELEMENTS)]
    norm = math.hypot(*(float(torch.linalg.vector_norm(block)) for block in blocks))
    return clip_factor(norm / divisor, workload.clip) / divisor
