"""A script whose model is cut into stages, as many as it is told. For test_stages.py."""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import psa_store as psa
from chaos.train import await_end

BLOCKS = 4
WIDTH = 24


class Block(nn.Module):
    """With buffers that training changes, and with random numbers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.norm(self.linear(x))))


class Part(nn.Module):
    """Some blocks, under the names that they have in the whole model, the first and the last of which may share one."""

    def __init__(self, low: int, high: int, dropout: float, tied: bool) -> None:
        super().__init__()
        self.is_last = high == BLOCKS
        self.low = low
        self.weighted = tied
        if tied and (low == 0 or high == BLOCKS):
            torch.manual_seed(99)
            self.shared = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleDict()
        for index in range(low, high):
            torch.manual_seed(100 + index)  # equal, however the model is cut
            self.blocks[str(index)] = Block(dropout)

    def forward(self, carry: Any, microbatch: tuple[Tensor, Tensor]) -> Any:
        x, y = microbatch
        x = x if carry is None else carry
        if hasattr(self, "shared") and self.low == 0:
            x = self.shared(x)
        for block in self.blocks.values():
            x = block(x)
        if hasattr(self, "shared") and self.is_last:
            x = self.shared(x)
        loss = (x - y).square()
        if not self.is_last:
            return x
        return (loss.mean(), 1.0 + float(y[0, 0] > 0)) if self.weighted else loss.mean()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--job", required=True)
    options.add_argument("--steps", type=int, required=True)
    options.add_argument("--until", type=int, help="where this run ends, if not at --steps")
    options.add_argument("--stages", type=int, default=1)
    options.add_argument("--microbatches", type=int, default=4)
    options.add_argument("--dropout", type=float, default=0.0)
    options.add_argument("--tied", action="store_true", help="with a shared layer, and weights of micro-batches")
    options.add_argument("--clip", type=float, default=0.0)
    options.add_argument("--pause", type=float, default=0.0, help="of each step, as a larger model would take")
    options.add_argument("--end-after", type=Path)
    args = options.parse_args()
    torch.set_num_threads(1)
    size = BLOCKS // args.stages
    stages = [partial(Part, low, low + size, args.dropout, args.tied) for low in range(0, BLOCKS, size)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, WIDTH, generator=generator)
    data = torch.utils.data.TensorDataset(x, x.roll(1, 1).sin())
    with psa.Worker(
        args.job,
        stages=stages,
        microbatches=args.microbatches,
        optimizer=psa.optim.AdamW(lr=1e-2, clip_grad_norm=args.clip or None),
        steps=args.until or args.steps,
        seed=3,
        shard_bytes=4096,
    ) as worker:
        for batch in worker.batches(data, batch_size=32):
            await_end(worker, args.steps, args.end_after)
            time.sleep(args.pause)  # what a larger model would compute
            step = worker.version
            loss = worker.compute(batch)
            worker.step(loss)
            if worker.is_main and worker.version == step + 1:
                os.write(1, f"step {worker.version} loss {loss}\n".encode())
    sys.exit(0)


if __name__ == "__main__":
    main()
