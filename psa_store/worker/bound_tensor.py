"""A tensor of the model, the places of it in flat memory, and samples of its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from xxhash import xxh3_64_intdigest

from psa_store.job.layout import TensorRole
from psa_store.optim.tensors import as_bytes

_SAMPLE_BYTES = 64 << 10


@dataclass(slots=True, eq=False)
class BoundTensor:
    """One tensor of the model and its places in the flat memory."""

    index: int
    role: TensorRole
    holder: dict[str, Tensor | None]
    """Where the module keeps it: looked up each time, because tensors may be reassigned."""
    name: str
    full_name: str
    view: Tensor
    address: int
    """Of ``view``."""
    shards: tuple[int, ...]
    """The trained shards that it has a part of."""

    @property
    def tensor(self) -> Tensor:
        """The model's present one."""
        tensor = self.holder[self.name]
        assert tensor is not None
        return tensor


def digest(tensor: Tensor) -> int:
    """Of all bytes of a contiguous CPU tensor."""
    return xxh3_64_intdigest(as_bytes(tensor.view(-1)))


def sample_digest(tensor: Tensor, turn: int) -> int:
    """Of some of its bytes, others in each turn: what changed all of it shows at once, and costs a few microseconds."""
    data = as_bytes(tensor.view(-1))
    low = turn * _SAMPLE_BYTES % max(1, len(data))
    return xxh3_64_intdigest(data[low : low + _SAMPLE_BYTES])
