"""Training script of test_position: prints which samples each rank computes at each step."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import psa_store as psa
from chaos.train import await_end


class Numbered(Dataset[tuple[int, torch.Tensor]]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if index >= self.samples:
            raise IndexError
        return index, torch.full((3,), index / self.samples)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--job", required=True)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--samples", type=int, default=160)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--pace-s", type=float, default=0.0)
    options.add_argument("--changed-data", action="store_true")
    options.add_argument("--drop-last", action="store_true")
    options.add_argument("--processes", type=int, default=0)
    options.add_argument("--hold-at", type=int, default=-1, help="a step at which to wait for the file --until")
    options.add_argument("--until", type=Path)
    options.add_argument("--end-after", type=Path)
    args = options.parse_args()
    torch.manual_seed(1)
    model = nn.Linear(3, 1)
    data = Numbered(args.samples)
    batch_size: int | None = args.batch
    source: Dataset[tuple[int, torch.Tensor]] | DataLoader[tuple[int, torch.Tensor]] = data
    with psa.Worker(args.job, model, optimizer=psa.optim.SGD(lr=0.01), steps=args.steps) as worker:
        if args.drop_last or args.processes:
            share = args.batch // worker.ranks
            source = DataLoader(data, share, shuffle=True, drop_last=args.drop_last, num_workers=args.processes)
            batch_size = None
        for indices, x in worker.batches(source, batch_size=batch_size, changed_data=args.changed_data):
            await_end(worker, args.steps, args.end_after)
            step, rank = worker.version, worker.rank
            if step == args.hold_at:
                while not args.until.exists():
                    time.sleep(0.01)  # files send no events; the test has a deadline
            time.sleep(args.pace_s)  # what a larger model would compute
            model(x).sum().backward()
            worker.step()
            say(f"seen {step} {rank} {' '.join(map(str, indices.tolist()))}")
            if worker.is_main:
                say(f"step {worker.version}")


def say(line: str) -> None:
    """Write a line at once: two processes share the pipe."""
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    main()
