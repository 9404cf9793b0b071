"""What one rank carries, in a worker: tensors by shard and part, and their way to servers and back as bytes.

See :mod:`psa_store.optim.rank_state` for what is in it. Used by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from psa_store.errors import Refused
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import Shard
from psa_store.optim.rank_state import COUNT_BYTES, RankState
from psa_store.optim.tensors import name_of, to_torch


class RankMemory:
    """``parts``: of every shard, its tensors by name, which whoever computes changes in place."""

    def __init__(self, parts: Mapping[int, dict[str, Tensor]]) -> None:
        self.parts = parts
        self.updates = 0
        """How many updates the optimizer's state has behind it."""

    def pack(self, shard: Shard, state: RankState) -> Tensor:
        """The bytes for servers, uint8. What is rounded in them is rounded here, too, so that both go on alike."""
        payload = torch.empty(state.size_bytes, dtype=torch.uint8)
        low = 0
        for name, dtype in state.parts:
            place = payload[low : low + state.numel * ITEM_BYTES[dtype]]
            tensor = self.parts[shard.index][name]
            if name_of(tensor.dtype) == dtype:
                place.copy_(tensor.view(torch.uint8))
            else:
                rounded = tensor.to(to_torch(dtype))
                place.copy_(rounded.view(torch.uint8))
                tensor.copy_(rounded)
            low += len(place)
        payload[low:].copy_(torch.from_numpy(np.array([self.updates], dtype="<i8").view(np.uint8)))
        return payload

    def unpack(self, shard: Shard, state: RankState, payload: memoryview) -> None:
        """Take over what servers kept.

        Raises:
            Refused: it has another length.
        """
        if len(payload) != state.size_bytes:
            raise Refused(f"STATE of {len(payload)} bytes for shard {shard.index}, which has {state.size_bytes}")
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        low = 0
        for name, dtype in state.parts:
            high = low + state.numel * ITEM_BYTES[dtype]
            tensor = self.parts[shard.index][name]
            whole = torch.empty(state.numel, dtype=to_torch(dtype))
            whole.view(torch.uint8).copy_(data[low:high])
            tensor.copy_(whole)
            low = high
        self.updates = int(np.frombuffer(payload[low : low + COUNT_BYTES], dtype="<i8")[0])
