"""psa itself: worker processes that use the public API, a server process, a private Redis and ZooKeeper."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing

import torch
from torch import Tensor, nn

import psa_store as psa
from psa_store.bench.children import ChildProcesses, CommandPipe, Stepper
from psa_store.bench.contender import Contender
from psa_store.bench.request import Rule
from psa_store.bench.workload import BETAS, EPS, WEIGHT_DECAY, Workload
from psa_store.config import load_settings
from psa_store.config.private_servers import Addresses
from psa_store.errors import UserCodeFailed
from psa_store.logs import configure
from psa_store.server import serve

_COMMIT_S = 60.0
_POLL_S = 0.01


def start(
    workload: Workload,
    processes: ChildProcesses,
    addresses: Addresses,
    name: str,
    job: str,
    carrier: str,
    more: Mapping[str, str] | None = None,
) -> Contender:
    """A new job with one worker a rank, and one server. ``carrier``: as in PSA_CARRIER. ``more``: other variables."""
    env = {
        "PSA_REDIS": addresses.redis,
        "PSA_ZOOKEEPER": addresses.zookeeper,
        "PSA_CARRIER": carrier,
        "PSA_SESSION_TIMEOUT_S": "60",  # a busy machine must not end a session, and with it send the job back
        "PSA_LOG_LEVEL": "warning",
        **(more or {}),
    }
    workers = [
        processes.spawn(f"{name}, worker {index}", _worker, workload, job, env=env) for index in range(workload.workers)
    ]
    contender = Contender(name, workers)
    # All workers have joined, so the first plan gives each of them one rank.
    contender.servers.append(processes.spawn(f"{name}, server", _server, job, env=env))
    return contender


def _server(_orders: CommandPipe, job: str) -> None:
    settings = load_settings()
    configure(settings.log_level, "server")
    serve(job, settings)


def _worker(commands: CommandPipe, workload: Workload, job: str) -> None:
    configure(load_settings().log_level, "worker")
    model = _Model(workload)
    if workload.rule is Rule.SGD:
        optimizer: psa.optim.Optimizer = psa.optim.SGD(lr=workload.lr, clip_grad_norm=workload.clip)
    else:
        optimizer = psa.optim.AdamW(
            lr=workload.lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, clip_grad_norm=workload.clip
        )
    with psa.Worker(job, model, optimizer=optimizer, ranks=workload.workers) as worker:
        commands.handle(_Steps(worker, model, workload, job))


class _Model(nn.Module):
    """Parameters without computation."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(high - low) for low, high in workload.pieces())

    def forward(self, gradients: list[Tensor]) -> Tensor:
        """A loss that has these gradients."""
        pairs = zip(self.weights, gradients, strict=True)
        return torch.stack([(weight * gradient).sum() for weight, gradient in pairs]).sum()


class _Steps(Stepper):
    """The loop of a training script, a turn at a time. The first turn has a real backward pass; after it the gradients
    stay in the memory that they are sent from, and later turns have nothing to compute."""

    def __init__(self, worker: psa.Worker, model: _Model, workload: Workload, job: str) -> None:
        self._worker = worker
        self._model = model
        self._workload = workload
        self._job = job
        self._batches = worker.batches(torch.zeros(workload.workers), batch_size=workload.workers)
        self._rank: int | None = None
        self._gradients: list[Tensor | None] = []

    def step(self) -> None:
        next(self._batches)
        if self._worker.members != self._workload.workers:
            raise UserCodeFailed(f"{self._worker.members} of {self._workload.workers} workers are left")
        if self._rank != self._worker.rank:
            self._rank = self._worker.rank
            self._backward(self._rank)
        for weight, gradient in zip(self._model.weights, self._gradients, strict=True):
            weight.grad = gradient
        self._worker.step()

    def settle(self) -> None:
        """Wait for the end of a commit that the block has begun: it counts here, not in the next contender."""
        if not self._worker.is_main:
            return
        end_s = time.monotonic() + _COMMIT_S
        with closing(psa.Store(self._job)) as store:
            every = store.config.commit_every
            due = self._worker.version // every * every if every else 0
            while store.version() < due:
                if time.monotonic() > end_s:
                    raise UserCodeFailed(f"version {due} is not committed after {_COMMIT_S:.0f} s")
                time.sleep(_POLL_S)

    def check(self, steps: int) -> None:
        if self._worker.version != steps:
            raise UserCodeFailed(f"version {self._worker.version} after {steps} steps: the job went back in between")
        self._workload.check(self._model.weights, steps)

    def _backward(self, rank: int) -> None:
        wanted = [self._workload.gradient(rank, low, high) for low, high in self._workload.pieces()]
        self._model(wanted).backward()
        # Before worker.step(), which leaves the script another view of them.
        self._gradients = [weight.grad for weight in self._model.weights]
