"""The generators of random numbers that scripts use, all of them seeded alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch


def seed_all(value: int) -> None:
    """Seed torch's, numpy's and Python's global generators. ``value``: 63 bits."""
    if _has_accelerator():
        torch.manual_seed(value)
    else:
        # Not torch.manual_seed: while CUDA is not initialised, it notes a stack trace for later, with every call.
        torch.default_generator.manual_seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


@contextmanager
def generators_kept() -> Iterator[None]:
    """What is drawn inside changes nothing of what is drawn after it."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


@cache
def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
