"""Training script of test_store: after step v, every element of every parameter is exactly v."""

from __future__ import annotations

import sys

import torch
from torch import nn

import psa_store as psa


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(300_000))
        self.matrix = nn.Parameter(torch.zeros(100, 7))
        self.narrow = nn.Parameter(torch.zeros(33, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x.sum() * 0 - self.wide.sum() - self.matrix.sum() - self.narrow.float().sum()


def main(job: str, steps: int) -> None:
    model = Counter()
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=1.0), steps=steps, shard_bytes=65536) as worker:
        for batch in worker.batches(torch.zeros(8, 1), batch_size=2):
            model(batch).backward()
            worker.step()
            assert int(model.wide[0]) == worker.version
            print(f"step {worker.version}", flush=True)


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]))
