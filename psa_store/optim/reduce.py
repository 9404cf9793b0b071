"""Sums and norms of gradients that do not depend on where, by how many threads, or in which order they were computed.

Used by servers. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROW_ELEMENTS = 1 << 12
"""vector_norm adds up in float32: over 67 M equal elements at once it is wrong by 1%, over rows of this length by
5e-6, at the same speed. A row is also far below what torch would split among threads, and so is the number of rows of
the largest shard: every sum here is made by one thread, in one order."""


def sum_in_order(
    parts: Sequence[Tensor], low: int, high: int, place: Tensor, weights: Sequence[float] | None = None
) -> Tensor:
    """Add up elements [low, high) of all parts, first to last, in the dtype of ``place`` and at its start.

    ``weights``: of each part; None: they count alike.
    """
    total = _span(place, 0, high - low)
    blocks = [_span(part, low, high) for part in parts]
    if weights is not None:
        torch.mul(blocks[0].to(place.dtype), weights[0], out=total)
        for block, weight in zip(blocks[1:], weights[1:], strict=True):
            total.add_(block.to(place.dtype), alpha=weight)
        return total
    if len(blocks) > 1 and blocks[0].dtype is place.dtype:
        torch.add(blocks[0], blocks[1], out=total)
        rest = blocks[2:]
    else:
        total.copy_(blocks[0])
        rest = blocks[1:]
    for block in rest:
        total.add_(block.to(place.dtype))  # adding across dtypes is several times slower than converting first
    return total


def _span(flat: Tensor, low: int, high: int) -> Tensor:
    """Elements [low, high). A small job's shards are blocks as a whole, and a slice costs as much as adding up a few
    thousand elements."""
    return flat if low == 0 and high == flat.numel() else flat[low:high]


def squared_norm(flat: Tensor) -> float:
    """The squared Euclidean norm of a contiguous 1-D tensor; inf or nan if an element is.

    Large finite float32 values do not overflow; float64 values whose squares exceed float64 give inf.
    """
    count = flat.numel()
    whole = count // _ROW_ELEMENTS * _ROW_ELEMENTS
    total = 0.0
    if whole:
        rows = torch.linalg.vector_norm(_span(flat, 0, whole).view(-1, _ROW_ELEMENTS), dim=1)
        total += float(rows.double().square().sum())
    if whole < count:
        total += float(torch.linalg.vector_norm(flat[whole:])) ** 2
    if math.isfinite(total) or flat.dtype is torch.float64:
        return total
    # Rare, and 30 times slower: a NaN, an infinity, or squares too large for float32 but not for float64.
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2


def clip_factor(shard_sq_norms: Sequence[float], max_norm: float | None) -> float:
    """What to multiply all gradients with so that their norm is at most ``max_norm``.

    The formula is that of ``torch.nn.utils.clip_grad_norm_``. ``shard_sq_norms``: in the order of shards,
    which fixes the bits of the sum. Returns nan if the norm is not finite, with or without a limit.
    """
    total = 0.0
    for sq_norm in shard_sq_norms:  # not sum(): since Python 3.12 it compensates, which gives other last bits
        total += sq_norm
    if not math.isfinite(total):
        return math.nan
    if max_norm is None:
        return 1.0
    return min(1.0, max_norm / (math.sqrt(total) + 1e-6))
