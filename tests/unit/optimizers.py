"""Optimizers of every kind that there is, for tests of what they are and of what they do."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

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
    "rmsprop_full": optim.RMSprop(1e-2, alpha=0.9, momentum=0.9, centered=True, weight_decay=0.1, eps=1e-6),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
