"""The generators of random numbers that scripts use, all of them seeded alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(value: int) -> None:
    """Seed torch's, numpy's and Python's global generators. ``value``: 63 bits."""
    if _has_accelerator():
        torch.manual_seed(value)
    else:
        # Not torch.manual_seed: while CUDA is not initialised, it notes a stack trace for later, with every call.
        torch.default_generator.manual_seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


@dataclass(frozen=True, slots=True)
class HostGenerators:
    """The state of those that draw on the host, at one moment."""

    of_torch: Tensor
    of_numpy: Any
    of_python: Any

    @classmethod
    def now(cls) -> HostGenerators:
        """What it is now."""
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Let them go on from there."""
        torch.set_rng_state(self.of_torch)
        np.random.set_state(self.of_numpy)
        random.setstate(self.of_python)


@contextmanager
def generators_kept() -> Iterator[None]:
    """What is drawn inside, on the host or on a CUDA device, changes nothing of what is drawn after it."""
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if initialized else ()
    state = HostGenerators.now()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            state.restore()


@cache
def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
