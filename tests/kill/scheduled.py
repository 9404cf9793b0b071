"""A script as for plain torch: an optimizer and a scheduler of torch, ticked after each step. For test_scheduled.py."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR

import psa_store as psa
from tests.integration.test_worker_api import make_data, make_model


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--job", required=True)
    options.add_argument("--steps", type=int, required=True)
    args = options.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    matrices = [each for each in model.parameters() if each.dim() > 1]
    vectors = [each for each in model.parameters() if each.dim() < 2]
    optimizer = torch.optim.NAdam([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 5e-3}], lr=2e-2)
    warm_up, fall = LinearLR(optimizer, 0.1, total_iters=10), LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
    scheduler = SequentialLR(optimizer, [warm_up, fall], milestones=[10])
    with psa.Worker(
        args.job, model, optimizer=optimizer, lr_scheduler=scheduler, steps=args.steps, seed=3, shard_bytes=4096
    ) as worker:
        for x, y in worker.batches(make_data(), batch_size=8):
            time.sleep(0.004)  # what a larger model would compute
            rate, step = scheduler.get_last_lr()[0], worker.version
            nn.functional.mse_loss(model(x), y).backward()
            worker.step()
            scheduler.step()
            if worker.is_main and worker.version == step + 1:  # it may also have gone back
                print(f"step {worker.version} rate {rate!r}", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
