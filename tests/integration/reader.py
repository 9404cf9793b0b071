"""Training script of test_carriers: it may stop to look at its parameters for as long as a test likes.

With ``--asleep-at``, it does so at that version before it computes anything, or with ``--pushed`` when all gradients
are on their way but ``step()`` was not called, and goes on when the file ``--until`` exists.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import psa_store as psa

_LOOK_S = 0.02


class Model(nn.Module):
    def __init__(self, floats: int) -> None:
        super().__init__()
        self.ballast = nn.Parameter(torch.ones(floats))
        self.layers = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.ballast.mean()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--job", required=True)
    options.add_argument("--steps", type=int, required=True)
    options.add_argument("--floats", type=int, default=1, help="make the model larger")
    options.add_argument("--asleep-at", type=int, default=-1)
    options.add_argument("--pushed", action="store_true")
    options.add_argument("--until", type=Path)
    args = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = Model(args.floats)
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(4))
    with psa.Worker(args.job, model, optimizer=psa.optim.SGD(lr=0.01), steps=args.steps) as worker:
        for x in worker.batches(data, batch_size=4):
            sleeps = worker.version == args.asleep_at
            if sleeps and not args.pushed:
                read_until(args.until, worker.version, model)
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            if sleeps and args.pushed:
                read_until(args.until, worker.version, model)
            worker.step()
            print(f"step {worker.version}", flush=True)


def read_until(wake: Path, version: int, model: nn.Module) -> None:
    """Print what the model is at the beginning, and at the end."""
    print(f"asleep {version} {checksum(model)}", flush=True)
    while not wake.exists():
        time.sleep(_LOOK_S)  # a file that appears is no event here; the loop ends with it, and the test has a deadline
    print(f"awake {version} {checksum(model)}", flush=True)


def checksum(model: nn.Module) -> str:
    total = hashlib.sha256()
    for parameter in model.parameters():
        total.update(parameter.detach().numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
