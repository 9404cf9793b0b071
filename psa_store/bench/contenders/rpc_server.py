"""What runs in the server process of the rpc contender. Imports torch.distributed.rpc: only its processes may."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from torch.futures import Future

from psa_store.bench.update import Update, mean_scale
from psa_store.bench.workload import Pieces, Workload


class _Server:
    def __init__(self, workload: Workload, pieces: Pieces) -> None:
        self._workload = workload
        self._parameters = [torch.zeros(high - low) for low, high in pieces]
        self._totals = [torch.zeros_like(piece) for piece in self._parameters]
        self._updates = [Update(workload, piece) for piece in self._parameters]
        self._lock = threading.Lock()
        self._arrived = 0
        self._next: Future[list[Tensor]] = Future()

    def push(self, gradient: Sequence[Tensor]) -> Future[list[Tensor]]:
        """Add a gradient; with the last one, make the next version and answer all workers."""
        with self._lock:
            answer = self._next
            for total, piece in zip(self._totals, gradient, strict=True):
                if self._arrived:
                    total.add_(piece)
                else:
                    total.copy_(piece)
            self._arrived += 1
            if self._arrived == self._workload.workers:
                scale = mean_scale(self._workload, self._totals, self._workload.workers)
                for update, total in zip(self._updates, self._totals, strict=True):
                    update.apply(total, scale)
                self._arrived, self._next = 0, Future()
                answer.set_result(self._parameters)
            return answer


_server: _Server | None = None


def set_up(workload: Workload, pieces: Pieces) -> None:
    """Make the one server of this process."""
    global _server
    _server = _Server(workload, pieces)


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def push(gradient: Sequence[Tensor]) -> Future[list[Tensor]]:
    """Called by workers: answers with the parameters of the next version."""
    assert _server is not None
    return _server.push(gradient)
