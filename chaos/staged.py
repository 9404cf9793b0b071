"""The training script of the kill tests and the chaos harness for models in stages: as :mod:`chaos.train`, but its
model is cut, into as many stages as it is told.

With PSA_JOURNAL it records which parameters each stage had when it was first called for a batch, and where all stages
are held, those of the whole model.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import psa_store as psa
from chaos.train import await_end
from psa_store.checkpoint.reader import tensors_digest
from psa_store.config import load_settings
from psa_store.testing.journal import Journal

BLOCKS = 4
WIDTH = 24


class Seen:
    """What the stages held here were at the present batch."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}

    def note(self, stage: int, module: nn.Module) -> None:
        """A stage is called; the first time, nothing has changed it since its parameters came."""
        if stage not in self.states:
            self.states[stage] = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def record(self, journal: Journal, stages: int, **where: int) -> None:
        """Write down what was seen, and forget it."""
        for stage, state in self.states.items():
            journal.record("batch", **where, stage=stage, digest=tensors_digest(state))
        if len(self.states) == stages:
            whole = {name: tensor for state in self.states.values() for name, tensor in state.items()}
            journal.record("batch", **where, digest=tensors_digest(whole))
        self.states.clear()


class Block(nn.Module):
    """With buffers that training changes, and with random numbers; one layer is frozen, one is bfloat16."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.narrow = nn.Linear(WIDTH, WIDTH).to(torch.bfloat16)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.linear(x + self.frozen(x)) + self.narrow(x.to(torch.bfloat16)).float()
        return x + self.dropout(torch.tanh(self.norm(inner)))


class Part(nn.Module):
    """Some blocks, under the names that they have in the whole model, the first and the last of which may share one."""

    def __init__(self, low: int, high: int, dropout: float, tied: bool, called: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.called = called
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
        self.called(self)
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
    options.add_argument("--resident", type=int, help="how many stages a worker has in memory at once")
    options.add_argument("--dropout", type=float, default=0.0)
    options.add_argument("--tied", action="store_true", help="with a shared layer, and weights of micro-batches")
    options.add_argument("--clip", type=float, default=0.0)
    options.add_argument("--average", action="store_true", help="keep one, and record what stages have of it")
    options.add_argument("--state", action="store_true", help="note each step there, and look whether it has them all")
    options.add_argument("--pace-s", type=float, default=0.0, help="of each batch, as a larger model would take")
    options.add_argument("--paced-until", type=Path, help="from when this file exists on, batches take no time")
    options.add_argument("--end-after", type=Path)
    args = options.parse_args()
    torch.set_num_threads(1)
    size = BLOCKS // args.stages
    journal, seen = Journal(load_settings().journal, "train", str(os.getpid())), Seen()

    def build(stage: int) -> nn.Module:
        low = stage * size
        note = partial(seen.note, stage) if journal.enabled else lambda module: None
        return Part(low, low + size, args.dropout, args.tied, note)

    stages = [partial(build, stage) for stage in range(args.stages)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, WIDTH, generator=generator)
    data = torch.utils.data.TensorDataset(x, x.roll(1, 1).sin())
    with (
        closing(journal),
        psa.Worker(
            args.job,
            stages=stages,
            microbatches=args.microbatches,
            resident_stages=args.resident,
            optimizer=psa.optim.AdamW(lr=1e-2, clip_grad_norm=args.clip or None),
            steps=args.until or args.steps,
            seed=3,
            shard_bytes=4096,
            average=psa.ema(0.9) if args.average else None,
            state={"steps": []} if args.state else None,
        ) as worker,
    ):
        for batch in worker.batches(data, batch_size=32):
            await_end(worker, args.steps, args.end_after)
            if args.paced_until is None or not args.paced_until.exists():
                time.sleep(args.pace_s)  # what a larger model would compute
            step, rank = worker.version, worker.rank
            if args.state and worker.state["steps"] != list(range(step)):
                sys.exit(f"worker.state has {worker.state} at version {step}")
            loss = worker.compute(batch)
            if args.state and loss is not None and rank == 0:
                worker.state["steps"].append(step)
            seen.record(journal, args.stages, term=worker.term, version=step, rank=rank)
            if loss is not None:
                journal.record("loss", version=step, rank=rank, loss=loss.item())
            worker.step(loss)
            if args.average and worker.version % 4 == 0:
                with worker.average() as version:
                    for stage, module in worker.stages.items():
                        values = tensors_digest({name: each.data for name, each in module.named_parameters()})
                        journal.record("average", version=version, stage=stage, digest=values)
            if worker.is_main and worker.version == step + 1:
                os.write(1, f"step {worker.version} loss {loss}\n".encode())
    sys.exit(0)


if __name__ == "__main__":
    main()
