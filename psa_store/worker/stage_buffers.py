"""The way of buffers of stages to the servers, behind the gradients of rank 0's cells.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Collection

from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.job.layout import TensorRole
from psa_store.worker.session import Tools
from psa_store.worker.stages import StagedModel


class StageBuffers:
    """Those of ``model``."""

    def __init__(self, tools: Tools, model: StagedModel) -> None:
        self._layout = tools.layout
        self._servers = tools.servers
        self._model = model

    def push(self, step: int, stage: int) -> None:
        """Push those of a stage that was computed, but for the script's state."""
        state = self._model.state
        for shard in self._layout.shards_of(TensorRole.BUFFER):
            if shard.home == stage and not (state is not None and shard.index in state.shards):
                data = self._model.flat(stage).buffers_as_of_now(shard)
                self._servers.push_value(step, RANK_OF_BUFFERS, shard.index, data)

    def push_state(self, step: int, stages: Collection[int]) -> None:
        """Push the script's state, if its stage is among these, which need not be in memory any more."""
        state = self._model.state
        for index in () if state is None else state.shards:
            shard = self._layout.shards[index]
            if shard.home in stages:
                assert state is not None
                is_here = shard.home in self._model.stages
                rest = self._model.flat(shard.home).parameters(shard) if is_here else bytes(shard.size_bytes)
                self._servers.push_value(step, RANK_OF_BUFFERS, index, state.to_push(shard, rest))
