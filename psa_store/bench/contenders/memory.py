"""The limit of memory: one thread copies as many bytes as the parameters have."""

from __future__ import annotations

import torch

from psa_store.bench.children import ChildProcesses, CommandPipe, Stepper
from psa_store.bench.contender import Contender
from psa_store.bench.names import COPY
from psa_store.bench.workload import Workload


def start(workload: Workload, processes: ChildProcesses) -> Contender:
    return Contender(COPY, [processes.spawn(COPY, _copy, workload.elements)])


def _copy(commands: CommandPipe, elements: int) -> None:
    commands.handle(_Copy(elements))


class _Copy(Stepper):
    def __init__(self, elements: int) -> None:
        self._source, self._target = torch.ones(elements), torch.zeros(elements)

    def step(self) -> None:
        self._target.copy_(self._source)
