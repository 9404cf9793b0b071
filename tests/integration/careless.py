"""Training script of test_carriers: it writes to its parameters, as no script should and some do.

An embedding shortens its rows in every forward pass. And after every odd step everything is wiped out, so that the
gradients of the next step are computed with zeros.
"""

from __future__ import annotations

import hashlib
import sys

import torch
from torch import nn

import psa_store as psa


def main(job: str, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(500, 16, max_norm=0.5), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    data = torch.arange(96)
    with psa.Worker(job, model, optimizer=psa.optim.AdamW(lr=0.05), steps=steps, shard_bytes=4096) as worker:
        for batch in worker.batches(data, batch_size=8):
            nn.functional.mse_loss(model(batch), batch[:, None] / 96).backward()
            before = worker.version
            worker.step()
            if worker.version != before:
                print(f"version {worker.version} {checksum(model)}", flush=True)
            if worker.version % 2:
                for parameter in model.parameters():
                    parameter.data.mul_(0)


def checksum(model: nn.Module) -> str:
    total = hashlib.sha256()
    for parameter in model.parameters():
        total.update(parameter.detach().numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    main(sys.argv[2], int(sys.argv[3]))
