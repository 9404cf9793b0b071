"""What a rank keeps from one version to the next, if anything, and how that is laid out as bytes.

In rounds: the state of its own optimizer, and where fragments or overlap let it drift, its parameters. With a
compression that holds something back: that. Servers keep it with its shard, as bytes that mean something to workers
only.

Pure: no I/O, no threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from psa_store.job.config import JobConfig
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import Shard, TensorRole
from psa_store.optim import from_dict
from psa_store.optim.slots import MASTER, slot_dtype

START = "start"
"""In rounds: where the rank began the present exchange of the shard."""
LOCAL = "local"
"""In rounds: where it stands."""
RESIDUAL = "residual"
"""What compression has held back."""
COUNT_BYTES = 8
"""At the end: how many updates the optimizer's state has behind it, int64."""


@dataclass(frozen=True, slots=True)
class RankState:
    """Of one shard: its ``parts``, by name and dtype in which they travel, one after the other; each ``numel`` long."""

    parts: tuple[tuple[str, str], ...]
    numel: int

    @property
    def size_bytes(self) -> int:
        return sum(ITEM_BYTES[dtype] for _, dtype in self.parts) * self.numel + COUNT_BYTES


def rank_state_of(config: JobConfig, shard: Shard) -> RankState | None:
    """What servers keep of each rank for this shard; None for nothing."""
    if not config.keeps_rank_state or shard.role is not TensorRole.TRAINED:
        return None
    compression = config.compression
    parts: list[tuple[str, str]] = []
    if config.ranks_update:
        # A job that saves bytes on gradients saves them on running means, too.
        rounded = "bfloat16" if compression.encodes else ""
        optimizer = from_dict(config.optimizer)
        dtypes = slot_dtype(optimizer, shard.dtype)
        exact = dtypes.pop(MASTER, shard.dtype)
        parts += [(name, rounded or dtype) for name, dtype in dtypes.items()]
        if config.ranks_drift:
            parts += [(START, exact), (LOCAL, exact)]
    if compression.needs_residual and compression.applies_to(shard.dtype):
        parts.append((RESIDUAL, "float32"))
    return RankState(tuple(parts), shard.numel) if parts else None
