"""The floor: the same reduction and update in one process and one thread, block by block, in shared memory.

There is no waiting and nothing is sent; a block of the sum never leaves the cache (except for a clipped update, which
needs the norm of the whole sum first).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_store.bench.children import ChildProcesses, CommandPipe, Stepper
from psa_store.bench.contender import Contender
from psa_store.bench.names import FLOOR
from psa_store.bench.update import Update, mean_scale
from psa_store.bench.workload import Workload

_BLOCK_ELEMENTS = 256 << 10


def start(workload: Workload, processes: ChildProcesses) -> Contender:
    return Contender(FLOOR, [processes.spawn("floor", _worker, workload)])


def _worker(commands: CommandPipe, workload: Workload) -> None:
    commands.handle(_Steps(workload))


@dataclass(frozen=True, slots=True)
class _Block:
    gradients: tuple[Tensor, ...]
    total: Tensor
    update: Update

    def reduce(self) -> None:
        """Sum in the order of ranks."""
        if len(self.gradients) == 1:
            self.total.copy_(self.gradients[0])
            return
        torch.add(self.gradients[0], self.gradients[1], out=self.total)
        for gradient in self.gradients[2:]:
            self.total.add_(gradient)


class _Steps(Stepper):
    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._parameters = _shared(torch.zeros(workload.elements))
        gradients = [_shared(workload.gradient(rank)) for rank in range(workload.workers)]
        clips = workload.clip is not None
        self._total = torch.zeros(workload.elements if clips else min(workload.elements, _BLOCK_ELEMENTS))
        self._blocks = []
        for low in range(0, workload.elements, _BLOCK_ELEMENTS):
            high = min(low + _BLOCK_ELEMENTS, workload.elements)
            self._blocks.append(
                _Block(
                    gradients=tuple(gradient[low:high] for gradient in gradients),
                    total=self._total[low:high] if clips else self._total[: high - low],
                    update=Update(workload, self._parameters[low:high]),
                )
            )

    def step(self) -> None:
        if self._workload.clip is None:
            for block in self._blocks:
                block.reduce()
                block.update.apply(block.total, 1.0 / self._workload.workers)
            return
        for block in self._blocks:
            block.reduce()
        scale = mean_scale(self._workload, [self._total], self._workload.workers)
        for block in self._blocks:
            block.update.apply(block.total, scale)

    def check(self, steps: int) -> None:
        self._workload.check([self._parameters], steps)


def _shared(values: Tensor) -> Tensor:
    """A copy in memory of a memfd, as processes would share it. Lives as long as the tensor."""
    descriptor = os.memfd_create("psa-bench-floor")
    try:
        os.ftruncate(descriptor, values.nbytes)
        memory = mmap.mmap(descriptor, values.nbytes)
    finally:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.float32).copy_(values)
