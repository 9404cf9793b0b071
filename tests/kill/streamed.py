"""A script that reads a stream, and writes down which samples made each step. For test_streams.py."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset

import psa_store as psa
from chaos.train import await_end
from tests.integration.toy import make_model

LENGTH = 500


class Shuffled(IterableDataset[tuple[int, torch.Tensor]]):
    """Its order is drawn from the global generator, as a buffer that shuffles has it."""

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for index in torch.randperm(LENGTH).tolist():
            yield index, torch.randn(6, generator=torch.Generator().manual_seed(index))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--job", required=True)
    options.add_argument("--steps", type=int, required=True)
    options.add_argument("--end-after", type=Path)
    options.add_argument("--loader", action="store_true", help="through a DataLoader, with a process")
    args = options.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    data = DataLoader(Shuffled(), batch_size=4, num_workers=1) if args.loader else Shuffled()
    with psa.Worker(args.job, model, optimizer=psa.optim.AdamW(lr=1e-2), steps=args.steps, seed=3) as worker:
        for index, x in worker.batches(data, batch_size=None if args.loader else 8):
            await_end(worker, args.steps, args.end_after)
            time.sleep(0.004)  # what a larger model would compute
            step, rank = worker.version, worker.rank
            # Before the step: a worker may die right after it. At once: workers share the pipe.
            os.write(1, f"read {step} {rank} {' '.join(map(str, index.tolist()))}\n".encode())
            model(x).square().mean().backward()
            worker.step()
            if worker.is_main and worker.version == step + 1:
                os.write(1, f"step {worker.version}\n".encode())
    sys.exit(0)


if __name__ == "__main__":
    main()
