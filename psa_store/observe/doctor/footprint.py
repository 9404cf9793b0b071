"""How much of a job Redis keeps, from what the job is: before its first version is stored as well.

Pure: no I/O, no threads.
"""

from __future__ import annotations

from dataclasses import dataclass

from psa_store.job.config import JobConfig
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import Layout, Shard, TensorRole
from psa_store.optim import from_dict
from psa_store.optim.rank_state import rank_state_of
from psa_store.optim.slots import slot_dtype


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a job in Redis, without what Redis adds to them."""

    version_bytes: int
    """One version: parameters, buffers, slots of optimizer and average, what is published beside them, rank state."""
    frozen_bytes: int
    """What is stored once."""
    versions: int

    @property
    def kept_bytes(self) -> int:
        return self.versions * self.version_bytes + self.frozen_bytes


def footprint_of(config: JobConfig, layout: Layout) -> Footprint:
    """What the job takes when Redis keeps as many versions as it ever will.

    Raises:
        DataIntegrity: the optimizer cannot be read.
    """
    version = sum(stored_bytes(config, shard) for shard in layout.versioned)
    frozen = sum(shard.size_bytes for shard in layout.shards_of(TensorRole.FROZEN))
    return Footprint(version, frozen, config.versions_kept)


def stored_bytes(config: JobConfig, shard: Shard) -> int:
    """One version of one shard that changes; raises DataIntegrity if the optimizer cannot be read."""
    count = shard.size_bytes
    if shard.role is TensorRole.TRAINED:
        optimizer = from_dict(config.server_optimizer)
        slots = slot_dtype(optimizer, shard.dtype, config.average)
        count += shard.numel * sum(ITEM_BYTES[dtype] for dtype in slots.values())
        if config.publishes_movements and config.compression.applies_to(shard.dtype):
            count += shard.size_bytes
    rank_state = rank_state_of(config, shard)
    return count if rank_state is None else count + config.ranks * rank_state.size_bytes
