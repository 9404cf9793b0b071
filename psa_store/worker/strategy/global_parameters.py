"""In rounds (local): the global parameters and buffers as servers send them, beside the model that ranks take turns in.

They never go into the model while a rank computes in it: they wait in memory of their own until a round begins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psa_store.compression.codec import decode
from psa_store.job.layout import Shard, TensorRole
from psa_store.optim.kernels import make_scratch
from psa_store.optim.tensors import as_bytes, to_torch
from psa_store.wire import Flag, Header
from psa_store.worker.flat_model import FlatModel
from psa_store.worker.session import Tools
from psa_store.worker.strategy.base import place_parameters


class GlobalParameters:
    """``newest`` and ``model`` are by trained and buffer shard: what servers sent last, and what the model has."""

    def __init__(self, tools: Tools, model: FlatModel) -> None:
        self._config = tools.config
        self._flat_model = model
        self.trained = tools.layout.shards_of(TensorRole.TRAINED)
        self.buffers = tools.layout.shards_of(TensorRole.BUFFER)
        changing = self.trained + self.buffers
        self.model = {s.index: torch.frombuffer(model.parameters(s), dtype=to_torch(s.dtype)) for s in changing}
        self.newest = {s.index: torch.zeros(s.numel, dtype=to_torch(tools.wire.dtype(s))) for s in changing}
        self._versions: dict[int, int] = {}
        """Of each shard: a movement that comes a second time, after a lost connection, is known by it."""
        self.round_buffers: dict[int, Tensor] = {}
        """By shard, the buffers with which a rank begins the present round."""
        self.scratch = make_scratch()
        """For the kernels of ranks, which work one at a time."""

    def place(self, header: Header, shard: Shard) -> memoryview:
        """Name the memory for a shard that comes by value."""
        if header.flags & Flag.MOVEMENT and self._config.publishes_movements:
            return memoryview(bytearray(self._config.compression.payload_bytes(shard.numel)))
        if shard.role is TensorRole.FROZEN or header.flags & Flag.MOVEMENT:
            return place_parameters(self._flat_model, header, shard)
        return as_bytes(self.newest[shard.index])

    def take(self, header: Header, payload: memoryview) -> None:
        """A shard has come: whole, or as what a version adds to the one before, which is here."""
        if header.flags & Flag.MOVEMENT:
            if header.step <= self._versions[header.shard]:
                return
            moved = torch.empty_like(self.newest[header.shard])
            decode(self._config.compression, torch.frombuffer(payload, dtype=torch.uint8), moved)
            self.newest[header.shard].add_(moved)
        self._versions[header.shard] = header.step

    def keep_buffers(self) -> None:
        """Begin rounds with these buffers, whatever comes meanwhile."""
        self.round_buffers = {shard.index: self.newest[shard.index].clone() for shard in self.buffers}

    def show_buffers(self) -> None:
        """Let the model have the buffers of the round."""
        for shard, value in self.round_buffers.items():
            self.model[shard].copy_(value)
        self._flat_model.version_arrived()

    def show(self) -> None:
        """Let the model have all of it: the job has ended."""
        for shard in self.trained:
            self.model[shard.index].copy_(self.newest[shard.index])
        self.keep_buffers()
        self.show_buffers()
