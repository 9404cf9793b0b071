"""In rounds (local): one held rank, with an optimizer of its own and parameters that move away from the global ones."""

from __future__ import annotations

import torch
from torch import Tensor

from psa_store.compression.codec import encode
from psa_store.errors import NonFiniteGradient
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, Shard
from psa_store.job.sampling import rounding_stream
from psa_store.optim import Optimizer, from_dict
from psa_store.optim.kernels import ShardKernel, init_slots
from psa_store.optim.rank_state import LOCAL, RESIDUAL, START
from psa_store.optim.slots import MASTER
from psa_store.worker.gradients import GradientMemory
from psa_store.worker.rank_state import RankMemory
from psa_store.worker.strategy.global_parameters import GlobalParameters


class LocalRank:
    """``memory``: what it has of an earlier term, if that is to go on."""

    def __init__(
        self, rank: int, config: JobConfig, layout: Layout, parameters: GlobalParameters, memory: RankMemory | None
    ) -> None:
        self._rank = rank
        self._config = config
        self._layout = layout
        self._parameters = parameters
        self.memory = memory or _new_memory(config, layout, parameters)
        self._optimizer: Optimizer | None = None
        self._kernels: dict[int, ShardKernel] = {}
        """They apply this optimizer, if it has been used already."""
        self.buffers: list[tuple[int, Tensor]] = []
        """Those of the model after its last step, by shard, if all ranks get them."""
        self.pushed: list[tuple[int, Tensor]] = []
        """What it pushed last, by shard, until the version is here: a connection may break."""
        self.pushed_round = 0

    def show(self) -> None:
        """Let the model have the parameters of this rank, and the buffers of the round."""
        for shard in self._parameters.trained:
            parts = self.memory.parts[shard.index]
            self._parameters.model[shard.index].copy_(parts[LOCAL])
            if MASTER in parts:
                parts[MASTER].copy_(parts[LOCAL])
        self._parameters.show_buffers()

    def apply(self, gradients: GradientMemory, step: int, factor: float, optimizer: Optimizer) -> None:
        """Make a step of its own, in the model."""
        if optimizer is not self._optimizer:
            self._optimizer = optimizer
            self._make_kernels(optimizer)
        scratch, updates = self._parameters.scratch, self.memory.updates
        absent = gradients.note.absent
        for shard, kernel in self._kernels.items():
            kernel.apply(
                [gradients.numbers[shard]], scratch, step=step, opt_step=updates, grad_scale=factor, absent=absent
            )
        self.memory.updates += 1

    def _make_kernels(self, optimizer: Optimizer) -> None:
        for shard in self._parameters.trained:
            model, parts = self._parameters.model[shard.index], self.memory.parts[shard.index]
            slots = {name: tensor for name, tensor in parts.items() if name not in (START, LOCAL, RESIDUAL)}
            self._kernels[shard.index] = ShardKernel(optimizer, self._layout, shard, model, slots)

    def leave_model(self, *, with_buffers: bool) -> None:
        """The last step of the round is made: keep what is in the model."""
        for shard in self._parameters.trained:
            parts = self.memory.parts[shard.index]
            parts[LOCAL].copy_(parts.get(MASTER, self._parameters.model[shard.index]))
        if with_buffers:
            self.buffers = [(s.index, self._parameters.model[s.index].clone()) for s in self._parameters.buffers]

    def movement(self, shard: Shard, number: int) -> Tensor:
        """What to push of a shard in this round; with overlap, move on from there."""
        config, parts = self._config, self.memory.parts[shard.index]
        newest = self._parameters.newest[shard.index]
        moved = parts[START] - parts[LOCAL]
        if not torch.isfinite(moved).all():
            raise NonFiniteGradient(
                f"rank {self._rank} has left the range of numbers in round {number}, in "
                f"{self._layout.tensor_at(shard, int((~torch.isfinite(moved)).nonzero()[0]))}. "
                "Lower the learning rate, or clip."
            )
        payload: Tensor
        if config.compression.applies_to(shard.dtype):
            payload = torch.empty(config.compression.payload_bytes(shard.numel), dtype=torch.uint8)
            stream = rounding_stream(config.seed, number, self._rank, shard.index)
            encode(config.compression, moved, payload, stream=stream, residual=parts.get(RESIDUAL))
        else:
            payload = moved.to(newest.dtype).view(torch.uint8)
        if config.mode.overlap:
            parts[LOCAL].copy_(newest).sub_(moved)
            parts[START].copy_(parts[LOCAL])
        return payload

    def adopt(self, exchanged_in: int) -> None:
        """Continue from the global parameters in the shards that were exchanged in that round."""
        for shard in self._parameters.trained:
            if self._config.mode.exchanges(shard.index, exchanged_in):
                parts = self.memory.parts[shard.index]
                parts[LOCAL].copy_(self._parameters.newest[shard.index])
                parts[START].copy_(parts[LOCAL])


def _new_memory(config: JobConfig, layout: Layout, parameters: GlobalParameters) -> RankMemory:
    parts: dict[int, dict[str, Tensor]] = {}
    for shard in parameters.trained:
        model = parameters.model[shard.index]
        slots = init_slots(from_dict(config.optimizer), model, shard, layout)
        exact = slots.get(MASTER, model)
        parts[shard.index] = {**slots, START: torch.empty_like(exact), LOCAL: torch.empty_like(exact)}
        if config.compression.needs_residual:
            parts[shard.index][RESIDUAL] = torch.zeros(shard.numel)
    return RankMemory(parts)
