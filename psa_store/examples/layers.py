"""What the models of the examples are made of, beside attention: places, the small network, the first values."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn


@cache
def rotation(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, size / 2), of the angles by which each place turns each pair of elements."""
    frequencies = 10_000.0 ** -(torch.arange(0, size, 2, device=device) / size)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def turned(x: Tensor, first: int = 0) -> Tensor:
    """Rotary places (arXiv 2104.09864): (..., length, size), so that products tell how far two tokens are apart.

    ``first``: the place of the first of them.
    """
    cosines, sines = rotation(first + x.shape[-2], x.shape[-1], x.device)
    cosines, sines = cosines[first:], sines[first:]
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cosines - right * sines, left * sines + right * cosines), dim=-1)


def feed_forward(width: int) -> nn.Sequential:
    """A small network for each token alone."""
    return nn.Sequential(
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


def initialise(model: nn.Module, additions: int) -> None:
    """Draw the first values of all matrices.

    A model's layers add so many times to its residual stream: what they add is scaled down, so that the stream starts
    out as wide as its input.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            into_stream = name.endswith(("project_out.weight", "mlp.2.weight"))
            nn.init.normal_(parameter, std=0.02 / (math.sqrt(additions) if into_stream else 1.0))
