"""A script for PsaStrategy: a small module with dropout, a scheduler, validation, early stopping and checkpoints."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 48


class Module(L.LightningModule):  # type: ignore[misc]
    """Regression with two layers. ``interval``: of the scheduler, "step" or "epoch"."""

    def __init__(self, interval: str = "step", dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 1))
        self.interval = interval

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.layers(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        if self.interval == "step":
            total = int(self.trainer.estimated_stepping_batches)
            scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        else:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


def data(count: int = SAMPLES, seed: int = 7) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=draw)
    return TensorDataset(x, x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=draw))


class Watches(Callback):  # type: ignore[misc]
    """Say where the Trainer is; kill this process in a step, once over all processes."""

    def __init__(self, at: int = -1, note: Path | None = None) -> None:
        self._at, self._note = at, note

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        assert trainer.global_step % trainer.num_training_batches == batch_idx
        print(f"step {trainer.global_step} epoch {trainer.current_epoch} rate {rate:.6g}", flush=True)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if self._note is not None and trainer.global_step == self._at and not self._note.exists():
            self._note.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            value = float(trainer.callback_metrics["val_loss"])
            print(f"validated {trainer.global_step} epoch {trainer.current_epoch} {value:.6f}", flush=True)


def main(arguments: list[str] | None = None) -> tuple[L.Trainer, Module]:
    options = argparse.ArgumentParser()
    options.add_argument("--job")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--interval", default="step")
    options.add_argument("--dropout", type=float, default=0.2)
    options.add_argument("--patience", type=int)
    options.add_argument("--die-at", type=int, default=-1)
    options.add_argument("--note", type=Path)
    options.add_argument("--ckpt")
    args = options.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    strategy: Any = "auto"
    if args.job is not None:
        import psa_store.integrations.lightning  # noqa: F401  # it registers the name

        os.environ["PSA_JOB"] = args.job
        strategy = "psa"
    best = ModelCheckpoint(args.out, "best", monitor="val_loss", save_last=True, enable_version_counter=False)
    callbacks: list[Callback] = [Watches(args.die_at, args.note), best]
    if args.patience is not None:
        callbacks.append(EarlyStopping("val_loss", patience=args.patience))
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=args.epochs,
        gradient_clip_val=0.5,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(args.interval, args.dropout)
    trainer.fit(
        module, DataLoader(data(), batch_size=args.batch), DataLoader(data(16, 8), batch_size=8), ckpt_path=args.ckpt
    )
    if trainer.is_global_zero:
        score = best.state_dict()["best_model_score"]
        print(f"done {trainer.global_step} epoch {trainer.current_epoch} best {score:.6f}", flush=True)
    return trainer, module


if __name__ == "__main__":
    main()
