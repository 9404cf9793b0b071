"""What the examples share around their models: options, optimizer, evaluation, packages that are optional."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import psa_store as psa


def add_options(parser: argparse.ArgumentParser, *, job: str, steps: int) -> None:
    """Add what every example is asked: which job, where it ends, and the numbers of its optimizer.

    ``job`` and ``steps`` are what is meant if nothing is said.
    """
    add = parser.add_argument
    add("--job", default=job, help="name of the training run; running it again resumes it")
    add("--steps", type=int, default=steps, help="where the job ends; may be raised later")
    add("--ranks", type=int, help="world size of a new job (default: as `psa run` says)")
    add("--stages", type=positive, default=1, help="parts of the model, which different workers may compute")
    add("--microbatches", type=positive, default=1, help="parts in which a rank's batch goes through the stages")
    add("--resident-stages", type=positive, metavar="N", help="stages that this process has in memory at once")
    add("--seed", type=int, default=1337)
    add("--lr", type=float, default=1e-3)
    add("--min-lr", type=float, default=1e-4)
    add("--warmup", type=int, default=100, help="steps in which the learning rate rises")
    add("--decay-steps", type=int, default=steps, help="step at which it has fallen to --min-lr")
    add("--weight-decay", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest norm of a step's gradient")
    add("--eval-every", type=int, default=0, metavar="N", help="evaluate every N steps (default: at the end)")
    add("--threads", type=int, default=1, help="threads of this process")
    add("--timing", type=Path, metavar="FILE", help="write the time per step to FILE, as JSON")


def positive(text: str) -> int:
    """The type of an option that is a whole number, 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def build_optimizer(options: argparse.Namespace) -> psa.optim.AdamW:
    """AdamW with weight decay for matrices only. It belongs to the job and cannot change while the job lives."""
    return psa.optim.AdamW(
        lr=psa.optim.warmup_cosine(options.lr, warmup=options.warmup, total=options.decay_steps, final=options.min_lr),
        betas=(0.9, 0.99),
        weight_decay=0.0,
        clip_grad_norm=options.clip,
        groups=[psa.optim.group("matrices", weight_decay=options.weight_decay)],
    )


def is_in_stages(options: argparse.Namespace) -> bool:
    """Whether the model is trained in parts, by ``worker.compute()``."""
    return bool(options.stages > 1 or options.microbatches > 1)


def parts(
    options: argparse.Namespace, model: nn.Module, loss: Callable[[Any], Any], layers: Sequence[str]
) -> dict[str, Any]:
    """What the worker trains: the model, or stages of it.

    ``loss``: a method of the model, to be cut so that each stage has about as many of ``layers``, in their order.
    """
    if not is_in_stages(options):
        return {"model": model, "resident_stages": options.resident_stages}  # psa.Worker refuses a number
    if options.stages > len(layers):
        raise psa.errors.UsageError(f"--stages {options.stages}: a model of {len(layers)} layers has so many at most")
    cuts = [layers[stage * len(layers) // options.stages] for stage in range(1, options.stages)]
    stages = psa.split(loss, cuts)
    return {"stages": stages, "microbatches": options.microbatches, "resident_stages": options.resident_stages}


def load_if_in_stages(options: argparse.Namespace, model: nn.Module) -> None:
    """Where no process has the whole model, read it as the job has it: its newest durable version."""
    if is_in_stages(options):
        with psa.Store(options.job) as store:
            model.load_state_dict(store.state_dict())


def evaluation_is_due(options: argparse.Namespace, step: int) -> bool:
    """Whether to evaluate after ``step`` steps; after the last of them the report does."""
    return options.eval_every > 0 and step % int(options.eval_every) == 0 and step != options.steps


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``loss``: the mean, in nats per token."""

    loss: float
    tokens: int

    def __str__(self) -> str:
        return f"validation loss {self.loss:.4f} ({self.tokens} tokens)"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model drops nothing and keeps nothing for gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def say_how_to_go_on(options: argparse.Namespace, worker: psa.Worker) -> None:
    """End a report. The job's other processes may be gone already."""
    if not worker.finished:
        print(f"stopped at step {worker.version} of {options.steps}; the same command goes on from there", flush=True)
        return
    print(f"job {options.job} is at step {worker.version}; the same command with a larger --steps goes on from there")
    print(f"`psa status {options.job}` shows it (after `psa up`, if its Redis and ZooKeeper were private)", flush=True)


def optional(module: str) -> Any:
    """Import a module of a package that only examples need; raises UsageError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise psa.errors.UsageError(f"{error}: this example needs it. pip install 'psa_store[examples]'") from error
