"""A rank's batch in equal parts, along the first dimension of each of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from psa_store.errors import UsageError


def microbatches_of(batch: Any, count: int) -> list[Any]:
    """Cut a batch: a tensor, or a tuple, list or mapping of such; what is no tensor goes to each part.

    Raises:
        UsageError: a tensor can not be cut into so many equal parts, or there is none.
    """
    if count == 1:
        return [batch]
    sizes: set[int] = set()
    parts = [_part(batch, index, count, sizes) for index in range(count)]
    if not sizes:
        raise UsageError(f"a batch without a tensor can not be cut into {count} micro-batches: give tensors")
    return parts


def _part(value: Any, index: int, count: int, sizes: set[int]) -> Any:
    if isinstance(value, Tensor):
        size = len(value) if value.dim() else 0
        sizes.add(size)
        if size == 0 or size % count or len(sizes) > 1:
            raise UsageError(
                f"a batch of {' and '.join(map(str, sorted(sizes)))} samples for a rank can not be cut into {count} "
                "micro-batches: give each rank a multiple of microbatches= (batch_size counts those of all ranks, and "
                "a new job has as many ranks as workers, unless `psa run --ranks` says)"
            )
        length = size // count
        return value[index * length : (index + 1) * length]
    if isinstance(value, Mapping):
        return {key: _part(each, index, count, sizes) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_part(each, index, count, sizes) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(_part(each, index, count, sizes) for each in value)
    return value
