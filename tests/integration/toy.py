"""A small model and its data, for tests that compare with plain torch."""

from __future__ import annotations

import torch
from torch import nn


def make_model() -> nn.Sequential:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))


def make_data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [(torch.randn(6, generator=draw), torch.randn(1, generator=draw)) for _ in range(50)]
