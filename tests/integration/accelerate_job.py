"""A script of Accelerate: its usual loop, with an accelerator of psa or of its own."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 12


def make_model(dropout: float) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 1))


def data(count: int = 48, seed: int = 7) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=draw)
    return TensorDataset(x, x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=draw))


def train(accelerator: Any, batch: int, dropout: float, die_at: int = -1, note: Path | None = None) -> nn.Module:
    """Two passes, with what a script of Accelerate has in its loop."""
    model: Any = make_model(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loader, held_out = DataLoader(data(), batch_size=batch), DataLoader(data(16, 8), batch_size=8)
    model, optimizer, loader, held_out, scheduler = accelerator.prepare(model, optimizer, loader, held_out, scheduler)
    for index in range(2):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                if note is not None and accelerator.worker.version == die_at and not note.exists():
                    note.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                rate = scheduler.get_last_lr()[0]
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            accelerator.print(f"rate {rate:.6g}", flush=True)
        model.eval()
        with torch.no_grad():
            losses = [accelerator.gather_for_metrics(nn.functional.mse_loss(model(x), y)) for x, y in held_out]
        accelerator.print(f"pass {index} evaluated {float(torch.stack(losses).mean()):.6f}", flush=True)
    return accelerator.unwrap_model(model)  # type: ignore[no-any-return]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--job")
    options.add_argument("--die-at", type=int, default=-1)
    options.add_argument("--note", type=Path)
    args = options.parse_args()
    torch.set_num_threads(1)
    with accelerator_of(args.job) as accelerator:
        train(accelerator, 4, 0.2, args.die_at, args.note)
        if accelerator.is_main_process:
            print(f"done {accelerator.worker.version}", flush=True)


def accelerator_of(job: str | None) -> Any:
    if job is None:
        return Accelerator(cpu=True)
    from psa_store.integrations.accelerate import PsaAccelerator

    return PsaAccelerator(job, steps=STEPS, clip_grad_norm=0.5, cpu=True, step_scheduler_with_optimizer=False)


if __name__ == "__main__":
    main()
