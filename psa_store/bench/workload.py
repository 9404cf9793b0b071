"""What all contenders do: the same gradients, the same optimizer, and so the same parameters after as many steps.

The gradient of an element is a function of its index and the rank, the same in every step, and repeats along the
parameters. So what the parameters must be after any number of steps is known from one period, computed apart in
float64. Ranks are shifted against each other: leaving one out changes the sign of the mean in places, and with it
even the updates of AdamW, which depend on little else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_store.bench.request import Rule
from psa_store.errors import UserCodeFailed

ITEM_BYTES = 4
PIECE_ELEMENTS = 1 << 20
"""Of a tensor of the model, for contenders that have one."""
LR = {Rule.SGD: 0.1, Rule.ADAMW: 1e-3}
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-2
"""Of AdamW: the defaults of torch, spelled out."""

_PERIOD = 1021
_SHIFT = 37
_ABOVE_ZERO = 2.0**-16
"""Keeps every sum over at most 32 ranks away from zero, where the sign would be a matter of rounding."""
_RTOL, _ATOL = 1e-4, 1e-6


Pieces = list[tuple[int, int]]
"""Where tensors begin and end in the flat order."""


@dataclass(frozen=True, slots=True)
class Workload:
    """``elements`` float32 parameters, which begin as zeros, and one rank in each of ``workers`` workers."""

    elements: int
    workers: int
    rule: Rule
    clip: float | None = None
    """Largest norm of the mean gradient; None: not clipped."""

    @property
    def size_bytes(self) -> int:
        return self.elements * ITEM_BYTES

    @property
    def lr(self) -> float:
        return LR[self.rule]

    def pieces(self) -> Pieces:
        """The tensors of a model."""
        lows = range(0, self.elements, PIECE_ELEMENTS)
        return [(low, min(low + PIECE_ELEMENTS, self.elements)) for low in lows]

    def gradient(self, rank: int, low: int = 0, high: int | None = None) -> Tensor:
        """The gradient of one rank, of the elements from ``low`` to ``high``."""
        return _along(_one_period(rank), low, self.elements if high is None else high)

    def check(self, parameters: Iterable[Tensor], steps: int) -> None:
        """Compare parameters, in flat order and in any number of pieces, with what ``steps`` steps give.

        Raises:
            UserCodeFailed: they differ; the message names the first element that does.
        """
        expected = self._expected(steps)
        low = 0
        for tensor in parameters:
            found = tensor.detach().reshape(-1)
            wanted = _along(expected, low, low + found.numel())
            if not torch.allclose(found, wanted, rtol=_RTOL, atol=_ATOL):
                wrong = int((~torch.isclose(found, wanted, rtol=_RTOL, atol=_ATOL)).nonzero()[0])
                raise UserCodeFailed(
                    f"after {steps} steps, element {low + wrong} is {float(found[wrong])!r}, "
                    f"but the update gives {float(wanted[wrong])!r}"
                )
            low += found.numel()
        if low != self.elements:
            raise UserCodeFailed(f"{low} parameters instead of {self.elements}")

    def _expected(self, steps: int) -> Tensor:
        """One period of the parameters after ``steps`` steps, by the textbook and in float64."""
        mean = torch.stack([_one_period(rank).double() for rank in range(self.workers)]).mean(dim=0)
        whole, rest = divmod(self.elements, _PERIOD)
        norm = math.sqrt(whole * float(mean.square().sum()) + float(mean[:rest].square().sum()))
        gradient = mean * clip_factor(norm, self.clip)
        if self.rule is Rule.SGD:
            return (-self.lr * steps * gradient).float()
        average, average_square, parameter = (torch.zeros_like(gradient) for _ in range(3))
        for step in range(1, steps + 1):
            average = BETAS[0] * average + (1 - BETAS[0]) * gradient
            average_square = BETAS[1] * average_square + (1 - BETAS[1]) * gradient.square()
            first, second = average / (1 - BETAS[0] ** step), average_square / (1 - BETAS[1] ** step)
            parameter = parameter * (1 - self.lr * WEIGHT_DECAY) - self.lr * first / (second.sqrt() + EPS)
        return parameter.float()


def clip_factor(norm: float, clip: float | None) -> float:
    """What a gradient of this norm is multiplied by, as in ``torch.nn.utils.clip_grad_norm_``."""
    return 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))


def _one_period(rank: int) -> Tensor:
    index = (torch.arange(_PERIOD) + _SHIFT * rank) % _PERIOD
    return (index - _PERIOD // 2).float() / 1024 + _ABOVE_ZERO


def _along(period: Tensor, low: int, high: int) -> Tensor:
    """The values of a repeating pattern from ``low`` to ``high``."""
    first = low % _PERIOD
    return period.repeat(-(-(first + high - low) // _PERIOD))[first : first + high - low].clone()
