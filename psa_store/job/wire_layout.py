"""How gradients and parameters look between worker and server: as they are, or rounded to bfloat16.

A job with compression ``bf16:both`` sends float32 gradients and parameters in half the bytes. Gradients are rounded
once, by the worker; they are added, and the optimizer works, in float32. Parameters are rounded for the way only: what
servers keep, commit and restore is float32. Every carrier rounds alike, so the carrier never shows in the bits.

Rounded tensors lie as the arena has them, the segments of all stages squeezed to half their length where the first one
starts.

Pure: no I/O, no threads, no torch.
"""

from __future__ import annotations

from psa_store.compression import NONE, Compression
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import Layout, Shard, TensorRole


class WireLayout:
    """Dtypes and places of a layout's tensors in memory that is shared, sent and received. Thread-safe: constant."""

    def __init__(self, layout: Layout, compression: Compression = NONE) -> None:
        self._layout = layout
        self._narrow = compression.narrows
        starts: dict[tuple[TensorRole, str], int] = {}
        for shard in layout.shards:
            starts.setdefault((shard.role, shard.dtype), shard.offset_bytes)
        self._segment_starts = starts
        trained = layout.shards_of(TensorRole.TRAINED)
        self.gradient_bytes = max((self.offset_bytes(s) + self.size_bytes(s) for s in trained), default=0)
        """Size of memory that holds one rank's gradient."""

    @property
    def is_exact(self) -> bool:
        """Whether everything lies as in the arena."""
        return not self._narrow

    def dtype(self, shard: Shard) -> str:
        return self._dtype(shard.role, shard.dtype)

    def offset_bytes(self, shard: Shard) -> int:
        return self._place(shard.role, shard.dtype, shard.offset_bytes)

    def size_bytes(self, shard: Shard) -> int:
        return shard.numel * ITEM_BYTES[self.dtype(shard)]

    def tensor_dtype(self, index: int) -> str:
        spec = self._layout.tensors[index]
        return self._dtype(spec.role, spec.dtype)

    def tensor_offset_bytes(self, index: int) -> int:
        spec = self._layout.tensors[index]
        return self._place(spec.role, spec.dtype, self._layout.offsets_bytes[index])

    def _dtype(self, role: TensorRole, dtype: str) -> str:
        return "bfloat16" if self._narrow and role is TensorRole.TRAINED and dtype == "float32" else dtype

    def _place(self, role: TensorRole, dtype: str, offset_bytes: int) -> int:
        start = self._segment_starts[role, dtype]
        return start + (offset_bytes - start) * ITEM_BYTES[self._dtype(role, dtype)] // ITEM_BYTES[dtype]
