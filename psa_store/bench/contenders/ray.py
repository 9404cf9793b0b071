"""Synchronous parameter servers of Ray actors; bytes travel through Ray's shared memory store.

One is as in Ray's documentation: workers load the weights into a model and return an array for each parameter, the
server stacks and sums them and returns its tensors by name. The other is the best that can be done: flat arrays, copied
once on their way into the store, summed in place, and used where the store has them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psa_store.bench.children import ChildProcesses, CommandPipe, Stepper
from psa_store.bench.contender import Contender
from psa_store.bench.names import RAY, RAY_FLAT
from psa_store.bench.update import Update, mean_scale
from psa_store.bench.workload import Workload

_STORE_BYTES_MIN = 200 << 20
_SERVER_THREADS = 2
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
"""No usage is reported; and no actor is killed because other programs use much memory."""
_Array = npt.NDArray[np.float32]


def why_not() -> str:
    """Why it cannot take part; empty if it can."""
    return "" if importlib.util.find_spec("ray") else "not installed: pip install ray"


def start(workload: Workload, processes: ChildProcesses, folder: Path) -> Contender:
    """The documented one. Ray's own processes live below one of ours, which drives the actors."""
    return _start(RAY, processes, _drive, workload, str(folder / "ray"), _DocumentedServer, _DocumentedWorker)


def start_flat(workload: Workload, processes: ChildProcesses, folder: Path) -> Contender:
    """The best one, in the same Ray: it must leave before the documented one does."""
    return _start(RAY_FLAT, processes, _join, workload, str(folder / "ray"), _FlatServer, _FlatWorker)


def _start(name: str, processes: ChildProcesses, target: Callable[..., None], *arguments: Any) -> Contender:
    return Contender(name, [processes.spawn(name, target, *arguments, env=_ENVIRONMENT)])


def _drive(
    commands: CommandPipe, workload: Workload, folder: str, server: type[_Server], worker: type[_Worker]
) -> None:
    import ray

    ray.init(
        num_cpus=2 * (workload.workers + 1),
        object_store_memory=max(_STORE_BYTES_MIN, 8 * (workload.workers + 1) * workload.size_bytes),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _temp_dir=folder,
    )
    _handle(commands, _Steps(workload, ray, server, worker))


def _join(commands: CommandPipe, workload: Workload, folder: str, server: type[_Server], worker: type[_Worker]) -> None:
    import ray

    ray.init(address="auto", log_to_driver=False, logging_level="error", _temp_dir=folder)
    _handle(commands, _Steps(workload, ray, server, worker))


def _handle(commands: CommandPipe, steps: _Steps) -> None:
    try:
        commands.handle(steps)
    finally:
        steps.close()


class _Steps(Stepper):
    """A chain of futures: each step needs the parameters of the last."""

    def __init__(self, workload: Workload, ray: Any, server: type[_Server], worker: type[_Worker]) -> None:
        self._ray = ray
        self._server = ray.remote(server).remote(workload)
        self._workers = [ray.remote(worker).remote(workload, rank) for rank in range(workload.workers)]
        self._parameters = self._server.parameters.remote()
        ray.get([self._parameters, *(worker.ready.remote() for worker in self._workers)])

    def step(self) -> None:
        gradients = [worker.step.remote(self._parameters) for worker in self._workers]
        self._parameters = self._server.apply.remote(*gradients)
        self._ray.wait([self._parameters])

    def check(self, steps: int) -> None:
        self._ray.get([worker.check.remote(self._parameters, steps) for worker in self._workers])

    def close(self) -> None:
        self._ray.shutdown()


class _Server(Protocol):
    """An actor that has the parameters."""

    def __init__(self, workload: Workload) -> None: ...

    def parameters(self) -> Any:
        """What workers are given first."""

    def apply(self, *gradients: Any) -> Any:
        """One step: what workers are given next."""


class _Worker(Protocol):
    """An actor that has the gradient of a rank."""

    def __init__(self, workload: Workload, rank: int) -> None: ...

    def ready(self) -> None:
        """Called to wait for the end of the constructor."""

    def step(self, parameters: Any) -> Any:
        """Take the parameters, and return the gradient."""

    def check(self, parameters: Any, steps: int) -> None:
        """Compare the parameters with what they must be."""


class _DocumentedServer:
    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(_SERVER_THREADS)
        self._workload = workload
        self._parameters = [torch.zeros(high - low) for low, high in workload.pieces()]
        self._updates = [Update(workload, piece) for piece in self._parameters]

    def parameters(self) -> dict[str, Tensor]:
        return {f"weights.{index}": piece for index, piece in enumerate(self._parameters)}

    def apply(self, *gradients: list[_Array]) -> dict[str, Tensor]:
        totals = [torch.from_numpy(np.stack(pieces).sum(axis=0)) for pieces in zip(*gradients, strict=True)]
        scale = mean_scale(self._workload, totals, len(gradients))
        for update, total in zip(self._updates, totals, strict=True):
            update.apply(total, scale)
        return self.parameters()


class _DocumentedWorker:
    def __init__(self, workload: Workload, rank: int) -> None:
        torch.set_num_threads(1)
        self._workload = workload
        self._parameters = [torch.zeros(high - low) for low, high in workload.pieces()]
        self._gradient = [workload.gradient(rank, low, high).numpy() for low, high in workload.pieces()]

    def ready(self) -> None: ...

    def step(self, parameters: dict[str, Tensor]) -> list[_Array]:
        for mine, new in zip(self._parameters, parameters.values(), strict=True):
            mine.copy_(new)
        return self._gradient

    def check(self, parameters: dict[str, Tensor], steps: int) -> None:
        self._workload.check(parameters.values(), steps)


class _FlatServer:
    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(_SERVER_THREADS)
        self._workload = workload
        self._parameters = torch.zeros(workload.elements)
        self._total = torch.zeros(workload.elements)
        self._update = Update(workload, self._parameters)

    def parameters(self) -> _Array:
        return self._parameters.numpy()

    def apply(self, *gradients: _Array) -> _Array:
        np.copyto(self._total.numpy(), gradients[0])
        for gradient in gradients[1:]:
            np.add(self._total.numpy(), gradient, out=self._total.numpy())
        self._update.apply(self._total, mean_scale(self._workload, [self._total], len(gradients)))
        return self._parameters.numpy()


class _FlatWorker:
    def __init__(self, workload: Workload, rank: int) -> None:
        self._workload = workload
        self._gradient = workload.gradient(rank).numpy()

    def ready(self) -> None: ...

    def step(self, _parameters: _Array) -> _Array:
        return self._gradient

    def check(self, parameters: _Array, steps: int) -> None:
        self._workload.check([torch.from_numpy(parameters.copy())], steps)
