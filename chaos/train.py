"""The training script of the kill tests and the chaos harness.

Small, quick, and with everything that could break bit-identity. Dropout and augmentation draw random numbers, BatchNorm
has buffers, one buffer steers the output, one layer is frozen, one is bfloat16, two are tied, and the learning rate
follows a schedule. Prints a line per step from the main worker. With PSA_JOURNAL it records which parameters
user code got with every batch; the checker compares them with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import psa_store as psa
from psa_store.checkpoint.reader import tensors_digest
from psa_store.config import load_settings
from psa_store.testing.journal import Journal

MEETING_STEP = 20
HELD_STEPS = 5


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """A fixed linear problem, with noise drawn anew each time a sample is read."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(257, 12, generator=draw)
        self.y = self.x @ torch.randn(12, 1, generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.01 * torch.randn(12), self.y[index]


class Net(nn.Module):
    def __init__(self, width: int, *, buffers: bool = True) -> None:
        super().__init__()
        self.counts = buffers
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.first = nn.Linear(12, width)
        self.norm = nn.BatchNorm1d(width) if buffers else nn.LayerNorm(width)
        self.middle = nn.Linear(width, width, bias=False)
        self.narrow = nn.Linear(width, width).to(torch.bfloat16)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.middle.weight
        self.dropout = nn.Dropout(0.1)
        self.last = nn.Linear(width, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x + self.frozen(x))))
        x = self.dropout(torch.tanh(self.tied(torch.tanh(self.middle(x)))))
        # What a rank computes depends on its buffers, so those of one rank must not leak into another.
        if self.counts:
            self.calls += 1
        x = x * (1 + 0.001 * self.calls)
        return self.last(self.narrow(x.to(torch.bfloat16)).float())


def await_end(worker: psa.Worker, steps: int, go: Path | None) -> None:
    """Let the last steps wait for a file: the test that makes it is done with the job."""
    if go is not None and worker.version >= steps - HELD_STEPS:
        while not go.exists():
            time.sleep(0.01)  # user code can only poll files; the test has a deadline


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--job", required=True)
    options.add_argument("--steps", type=int, default=120)
    options.add_argument("--total", type=int, help="length of the learning rate's schedule, if not --steps")
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--pace-s", type=float, default=0.004)
    options.add_argument("--paced-until", type=Path, help="from when this file exists on, steps take no time")
    options.add_argument("--end-after", type=Path, help="the last steps wait until this file exists")
    options.add_argument("--meet", type=int, default=0, help="go on after step 20 once so many workers hold ranks")
    options.add_argument("--processes", type=int, default=0, help="DataLoader processes")
    options.add_argument("--lr", type=float, default=0.01)
    options.add_argument("--bufferless", action="store_true", help="a model that changes no buffer")
    options.add_argument("--clip", type=float, default=0.5, help="of the global norm; 0: none")
    options.add_argument("--shard-bytes", type=int, default=8192)
    options.add_argument("--poison-at", type=int, default=-1, help="step at which one gradient is NaN")
    args = options.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(7)
    model = Net(args.width, buffers=not args.bufferless)
    data = Noisy()
    source = DataLoader(data, shuffle=True, num_workers=args.processes) if args.processes else data
    optimizer = psa.optim.AdamW(
        lr=psa.optim.warmup_cosine(args.lr, warmup=5, total=args.total or args.steps, final=args.lr / 10),
        clip_grad_norm=args.clip or None,
        groups=[psa.optim.group("matrices", weight_decay=0.1)],
    )
    journal = Journal(load_settings().journal, "train", str(os.getpid()))
    to_meet = args.meet
    with (
        closing(journal),
        psa.Worker(
            args.job,
            model,
            optimizer=optimizer,
            steps=args.steps,
            seed=3,
            shard_bytes=args.shard_bytes,
        ) as worker,
    ):
        for x, y in worker.batches(source, batch_size=12):
            if journal.enabled:
                seen = tensors_digest(model.state_dict())
                journal.record("batch", term=worker.term, version=worker.version, rank=worker.rank, digest=seen)
            if to_meet and worker.version == MEETING_STEP:
                while worker.members < to_meet:
                    time.sleep(0.01)  # user code can only poll members; the test has a deadline
                print(f"met {worker.members}", flush=True)
                to_meet = 0  # once: they may leave before this step is over, and their ranks are computed here then
            await_end(worker, args.steps, args.end_after)
            if args.paced_until is None or not args.paced_until.exists():
                time.sleep(args.pace_s)  # what a larger model would compute
            loss = nn.functional.mse_loss(model(x), y)
            if worker.version == args.poison_at and worker.rank == worker.ranks - 1:
                loss = loss * float("nan")
            loss.backward()
            journal.record("loss", version=worker.version, rank=worker.rank, loss=loss.item())
            before = worker.version
            worker.step(loss)
            if worker.is_main and worker.version != before:
                print(f"step {worker.version} term {worker.term} loss {loss.item():.6f}", flush=True)
        journal.record("ended", finished=worker.finished, digest=tensors_digest(model.state_dict()))
        if worker.finished:
            print(f"finished {worker.version}", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
