"""torch.distributed's all_reduce over gloo, and the optimizer in every worker."""

from __future__ import annotations

from pathlib import Path

import torch

from psa_store.bench.children import ChildProcesses, CommandPipe, Stepper
from psa_store.bench.contender import Contender
from psa_store.bench.names import GLOO
from psa_store.bench.request import Rule
from psa_store.bench.update import Update, mean_scale
from psa_store.bench.workload import Workload

_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


def why_not() -> str:
    """Why this torch cannot do it; empty if it can."""
    import torch.distributed as dist

    return "" if dist.is_available() and dist.is_gloo_available() else "this torch is built without gloo"


def start(workload: Workload, processes: ChildProcesses, folder: Path) -> Contender:
    """A process a rank, which meet in a file of ``folder``."""
    meeting = folder / "gloo"
    workers = [
        processes.spawn(f"gloo, worker {rank}", _worker, workload, rank, str(meeting), env=_LOOPBACK)
        for rank in range(workload.workers)
    ]
    return Contender(GLOO, workers)


def _worker(commands: CommandPipe, workload: Workload, rank: int, meeting: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workload.workers)
    try:
        commands.handle(_Steps(workload, rank))
    finally:
        dist.destroy_process_group()


class _Steps(Stepper):
    """all_reduce leaves the sum where the gradient was. Copying the gradient anew before each step would cost gloo what
    it need not; so SGD reduces the sums again, and divides by as many powers of the number of workers. After AdamW,
    which is given a mean, each rank holds the mean, whose mean is the same."""

    def __init__(self, workload: Workload, rank: int) -> None:
        import torch.distributed as dist

        self._all_reduce = dist.all_reduce
        self._workload = workload
        self._rank = rank
        self._gradient = torch.zeros(workload.elements)
        self._parameters = torch.zeros(workload.elements)
        self._update = Update(workload, self._parameters)
        self._divisor = 1.0

    def prepare(self) -> None:
        self._gradient.copy_(self._workload.gradient(self._rank))
        self._divisor = 1.0

    def step(self) -> None:
        self._all_reduce(self._gradient)
        grows = self._workload.rule is Rule.SGD
        self._divisor = self._workload.workers * (self._divisor if grows else 1.0)
        self._update.apply(self._gradient, mean_scale(self._workload, [self._gradient], self._divisor))

    def check(self, steps: int) -> None:
        self._workload.check([self._parameters], steps)
