"""A script that says much to its worker: weights, metrics, state, a change, parameters out of use, an average, rates.

Optimizer and scheduler are torch's, and the script ticks the scheduler. For test_statements.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR

import psa_store as psa
from chaos.train import await_end
from psa_store.checkpoint.reader import tensors_digest
from tests.integration.toy import make_data

CHANGE_AT = 25


class Heads(nn.Module):
    """In each step one of two heads has its turn; ``never`` has none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.never = nn.Linear(6, 40), nn.Linear(3, 3)
        self.heads = nn.ModuleList(nn.Linear(40, 1) for _ in range(2))

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        return self.heads[int(step % 3 == 0)](torch.tanh(self.body(x)))  # type: ignore[no-any-return]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--job", required=True)
    options.add_argument("--steps", type=int, required=True)
    options.add_argument("--change-after", type=Path, required=True, help="a file that the change waits for")
    options.add_argument("--end-after", type=Path)
    args = options.parse_args()
    torch.set_num_threads(1)
    model = Heads()
    matrices = [each for each in model.parameters() if each.dim() > 1]
    vectors = [each for each in model.parameters() if each.dim() < 2]
    optimizer = torch.optim.NAdam([{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "lr": 5e-3}], lr=2e-2)
    warm_up, fall = LinearLR(optimizer, 0.1, total_iters=10), LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
    with psa.Worker(
        args.job,
        model,
        optimizer=optimizer,
        lr_scheduler=(scheduler := SequentialLR(optimizer, [warm_up, fall], milestones=[10])),
        steps=args.steps,
        seed=3,
        shard_bytes=4096,
        average=psa.ema(0.9),
        state={"tokens": 0, "best": None, "mean": torch.zeros(6)},
    ) as worker:
        for x, y in worker.batches(make_data(), batch_size=8):
            await_end(worker, CHANGE_AT, args.change_after)
            await_end(worker, args.steps, args.end_after)
            time.sleep(0.004)  # what a larger model would compute
            tokens, step, rate = 1 + int(x.abs().sum()), worker.version, scheduler.get_last_lr()[0]
            loss = nn.functional.mse_loss(model(x, step), y)
            loss.backward()
            if worker.rank == 0:
                worker.state["tokens"] += tokens
                worker.state["best"] = min(loss.item(), worker.state["best"] or 9.0)
                worker.state["mean"] += x.mean(0) / args.steps
            worker.step(loss, weight=tokens, metrics={"tokens": tokens})
            scheduler.step()
            if worker.is_main and worker.version == step + 1:  # it may also have gone back
                with worker.average() as at:
                    average = tensors_digest(dict(model.named_parameters()))
                assert at == worker.version
                print(f"step {worker.version} rate {rate!r} average {average}", flush=True)
                if worker.version == CHANGE_AT:
                    worker.change(weight_decay=0.0)
        if worker.is_main:
            end = worker.state | {"mean": worker.state["mean"].tolist()}
            print(f"state {json.dumps(end, sort_keys=True)}", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
