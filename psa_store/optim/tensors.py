"""Tensors and the names of their dtypes, tensors and their bytes: the one place that turns one into the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_torch(name: str) -> torch.dtype:
    """The dtype of a name such as ``float32``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, as layouts have it."""
    return str(dtype).removeprefix("torch.")


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, without a copy."""
    return tensor.view(torch.uint8).numpy().data


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """An array of the same values; bfloat16, which numpy does not have, becomes float32, which holds it exactly."""
    return np.asarray((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())
