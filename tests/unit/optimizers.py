"""Optimizers of every kind that there is, for tests of what they are and of what they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch

from psa_store import optim

OPTIMIZERS: Mapping[str, optim.Optimizer] = {
    "sgd": optim.SGD(0.1),
    "sgd_decay": optim.SGD(0.1, weight_decay=0.1),
    "sgd_momentum": optim.SGD(0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "sgd_nesterov": optim.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": optim.Adam(1e-2, weight_decay=0.1),
    "adamw": optim.AdamW(1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    "adagrad": optim.Adagrad(0.1, lr_decay=0.01, weight_decay=0.1, initial_accumulator_value=0.5, eps=1e-8),
    "rmsprop": optim.RMSprop(1e-2, weight_decay=0.1),
    "amsgrad": optim.Adam(1e-2, amsgrad=True, weight_decay=0.1, maximize=True),
    "adamw_amsgrad": optim.AdamW(1e-2, amsgrad=True),
    "sgd_maximize": optim.SGD(0.1, momentum=0.9, weight_decay=0.1, maximize=True),
    "adagrad_maximize": optim.Adagrad(0.1, weight_decay=0.1, maximize=True),
    "nadam": optim.NAdam(1e-2, weight_decay=0.1, momentum_decay=0.01),
    "nadam_decoupled": optim.NAdam(1e-2, betas=(0.99, 0.9), weight_decay=0.1, decoupled_weight_decay=True),
    "radam": optim.RAdam(1e-2, betas=(0.8, 0.95), weight_decay=0.1, maximize=True),
    "radam_decoupled": optim.RAdam(1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "adamax": optim.Adamax(1e-2, betas=(0.8, 0.95), weight_decay=0.1),
    "adadelta": optim.Adadelta(0.5, rho=0.8, weight_decay=0.1, maximize=True),
    "lion": optim.Lion(1e-3, weight_decay=0.1),
    "rmsprop_full": optim.RMSprop(1e-2, alpha=0.9, momentum=0.9, centered=True, weight_decay=0.1, eps=1e-6),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", which torch does not have."""

    def __init__(self, params: Iterable[Any], foreach: bool = False, **defaults: object) -> None:
        super().__init__(params, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False, **defaults})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = -param.grad if group["maximize"] else param.grad
                mean = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                update = (mean * beta1 + grad * (1 - beta1)).sign()
                param.copy_(param * (1 - lr * decay) - lr * update)
                mean.copy_(mean * beta2 + grad * (1 - beta2))
