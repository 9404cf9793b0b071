"""Training script of test_script_failures: raises where it is told to, for as long as it is told to."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import psa_store as psa


def main(job: str, times: int, notes: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = nn.Linear(4, 1)
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.05), steps=20) as worker:
        for batch in worker.batches(torch.randn(32, 4), batch_size=4):
            if worker.version == 7 and worker.rank == 1 and len(list(Path(notes).iterdir())) < times:
                (Path(notes) / str(len(list(Path(notes).iterdir())))).touch()
                raise OSError("the disk of the network did not answer")
            model(batch).square().mean().backward()
            worker.step()


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]), sys.argv[4])
