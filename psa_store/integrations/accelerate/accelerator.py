"""The subclass of ``Accelerator``; see the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from types import TracebackType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, send_to_device
from torch.utils.data import DataLoader

from psa_store.config import load_settings
from psa_store.errors import UsageError
from psa_store.integrations.ranks import epoch_steps, ranks_of, refuse_set_batch_size
from psa_store.integrations.rates import FollowedOptimizer
from psa_store.worker import Worker
from psa_store.worker.batches import RankStep, seed_everything
from psa_store.worker.streams import is_stream


class PsaAccelerator(Accelerator):  # type: ignore[misc]
    """``accelerate.Accelerator`` whose gradients are reduced, and whose parameters are updated, by psa's servers.

    Use it in a ``with`` statement, and start the script with `psa run`. Running the script again resumes the job.

    Args:
        job: name of the job; None takes ``PSA_JOB``.
        steps: where the job ends; None: where the script ends.
        seed: root of all randomness of the job.
        clip_grad_norm: limit of the norm of the mean gradient, as ``clip_grad_norm_`` names it in the loop.

    Raises:
        UsageError: an argument or a call asks for what psa does otherwise; the message says what to write.
    """

    _worker: Worker | None = None
    _entered = False
    _loss: torch.Tensor | None = None
    _has_batch = False
    _main_at: int | None = None
    """The step in which this process computed rank 0 the last time; -1: never; None: it made no step."""
    _was_main = True
    _since_tick = 0
    _ranks = 1

    def __init__(
        self,
        job: str | None = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        clip_grad_norm: float | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if self.distributed_type != DistributedType.NO:
            raise UsageError(
                f"PsaAccelerator: {self.distributed_type}: start the script with `psa run --workers N`, not with "
                "`accelerate launch`, and leave out plugins that share models out"
            )
        if self.gradient_accumulation_steps != 1:
            raise UsageError(
                f"PsaAccelerator: gradient_accumulation_steps={self.gradient_accumulation_steps}: start with as many "
                "times more ranks, `psa run --ranks N`: a worker computes its ranks one after the other"
            )
        if self.mixed_precision not in ("no", "bf16"):
            raise UsageError(f"PsaAccelerator: mixed_precision={self.mixed_precision!r}: use 'bf16'")
        name = job or load_settings().job
        if not name:
            raise UsageError("the job has no name: PsaAccelerator('my-gpt'), or set PSA_JOB")
        self._job, self._steps, self._seed, self._clip = name, steps, seed, clip_grad_norm

    # --- life

    def __enter__(self) -> PsaAccelerator:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._worker is not None:
            self._was_main = self.is_main_process
            self._worker.__exit__(kind, error, trace)
            self._worker = None

    @property
    def worker(self) -> Worker:
        """The worker of this process, from ``prepare`` to the end of the ``with``."""
        if self._worker is None:
            raise UsageError("accelerator.worker is there from prepare() to the end of the `with` statement")
        return self._worker

    def prepare(self, *args: Any, device_placement: Any = None) -> Any:
        """Join the job with a model, its optimizer and the train dataloader, and a scheduler if there is one.

        The first dataloader is the train dataloader; others stay whole in each process.
        """
        models = [each for each in args if isinstance(each, torch.nn.Module)]
        optimizers = [each for each in args if isinstance(each, torch.optim.Optimizer)]
        loaders = [each for each in args if isinstance(each, DataLoader)]
        schedulers = [each for each in args if isinstance(each, torch.optim.lr_scheduler.LRScheduler)]
        changed: dict[int, Any] = {id(each): self._whole(each) for each in loaders}
        if models or optimizers or schedulers:
            if (
                (len(models), len(optimizers)) != (1, 1)
                or not loaders
                or len(schedulers) > 1
                or self._worker is not None
            ):
                raise UsageError(
                    "prepare(): give one model, its optimizer and the train dataloader, and a scheduler if there is "
                    "one, in one call. For two optimizers give one with groups"
                )
            self._join(models[0], optimizers[0], schedulers[0] if schedulers else None)
            changed[id(optimizers[0])] = _Optimizer(optimizers[0], self)
            changed[id(loaders[0])] = _Passes(loaders[0], self)
            changed.update({id(each): _Scheduler(each, self) for each in schedulers})
        prepared = tuple(changed.get(id(each), each) for each in args)
        return prepared if len(prepared) > 1 else prepared[0]

    def _join(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        if not self._entered:
            raise UsageError(
                "write `with PsaAccelerator(…) as accelerator:`, so that the job learns how the script ends"
            )
        self._ranks = ranks_of(self._job)
        if scheduler is not None and self._ranks > 1 and self.step_scheduler_with_optimizer and not self.split_batches:
            raise UsageError(
                f"{type(scheduler).__name__}: Accelerate ticks it once for each process, so its numbers count their "
                "batches: make it with numbers that count steps, and say so by PsaAccelerator(…, "
                "step_scheduler_with_optimizer=False)"
            )
        self.prepare_model(model)  # autocast and device: it is one process
        self._followed = FollowedOptimizer(optimizer, scheduler, model, self._steps)
        rule = replace(self._followed.rule, clip_grad_norm=self._clip)
        worker = Worker(self._job, model, optimizer=rule, ranks=self._ranks, steps=self._steps, seed=self._seed)
        self._worker = worker.__enter__()

    def _whole(self, loader: DataLoader[Any]) -> Any:
        return prepare_data_loader(loader, self.device, num_processes=1, process_index=0, put_on_device=True)

    # --- the loop

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        self._loss = loss.detach()
        super().backward(loss, **kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
        """Leave it to the servers, which clip the mean gradient; return the norm of this rank's own."""
        if max_norm != self._clip or norm_type != 2:
            raise UsageError(
                f"clip_grad_norm_(…, {max_norm}): servers clip the mean gradient, and know the limit from the start: "
                f"PsaAccelerator(…, clip_grad_norm={max_norm})"
            )
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        norms = [torch.linalg.vector_norm(each.grad.detach()) for each in given if each.grad is not None]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def _end_step(self) -> None:
        worker = self.worker
        self._followed.check()
        if self._has_batch and worker.rank == 0:
            self._main_at = worker.version
        elif self._main_at is None:
            self._main_at = -1
        loss, self._loss, self._has_batch = self._loss, None, False
        self._since_tick += 1
        worker.step(loss)

    def _show_rates(self) -> None:
        version = self.worker.version
        self._followed.show(version, self.worker.lr_at(version))

    def _tick(self, with_arguments: bool) -> None:
        if with_arguments or self._since_tick != 1:
            raise UsageError(
                f"scheduler.step() after {self._since_tick} calls of optimizer.step(): a tick is one step: call it "
                "after each optimizer.step(), or not at all, and make it with numbers that count steps"
            )
        self._since_tick = 0

    # --- questions about processes

    @property
    def num_processes(self) -> int:
        """The number of ranks."""
        return self._ranks

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and saves: the one that computes rank 0."""
        worker = self._worker
        if worker is None:
            return self._was_main
        if worker.finished and self._main_at is not None:  # others may have left, and their ranks be here now
            return self._main_at == worker.version - 1
        return worker.is_main

    @property
    def is_local_main_process(self) -> bool:
        return self.is_main_process

    @property
    def process_index(self) -> int:
        """0 in the main process, else 1: ranks move from process to process."""
        return 0 if self.is_main_process else 1

    def wait_for_everyone(self) -> None:
        """Do nothing: steps are the barrier."""

    def on_main_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Run a function in the process that is the main one when it is called."""
        if function is None:
            return self.on_main_process

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if self.is_main_process else None

        return guarded

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.is_main_process:
            print(*args, **kwargs)

    def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: dict[str, Any] | None = None) -> None:
        if self.is_main_process:
            super().log(values, step, log_kwargs)

    def save(self, obj: Any, f: Any, safe_serialization: bool = False) -> None:
        if self.is_main_process:
            super().save(obj, f, safe_serialization)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        if self.is_main_process:
            super().save_model(*args, **kwargs)

    def gather(self, tensor: Any) -> Any:
        """Return what was given: each process evaluates all samples. Refused while a batch is trained with."""
        if self._has_batch:
            raise UsageError(
                "accelerator.gather, gather_for_metrics, reduce: there is no process group, and a rank has its own "
                "batch only: log what it has. `psa status` has the loss of all ranks"
            )
        return tensor

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        return self.gather(input_data)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        return self.gather(tensor)

    # --- what the job does itself

    def clip_grad_value_(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError("clip_grad_value_: it would clip each rank's gradient, not their mean: use clip_grad_norm_")

    def save_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError("save_state: servers commit all of it; name a version by `psa checkpoint save`, or save_model")

    def load_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError("load_state: a job goes on by itself; `psa checkpoint rollback` goes back")

    def register_for_checkpointing(self, *objects: Any) -> NoReturn:
        raise UsageError("register_for_checkpointing: write the loop with psa.Worker(…, state={…}), see worker.state")

    def skip_first_batches(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError("skip_first_batches: the job knows its place in the data: leave it out")

    def set_trigger(self) -> NoReturn:
        raise UsageError("set_trigger: there is no process group; decide by what is the same in all processes")


class _Optimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """The script's optimizer, whose step is the worker's."""

    def __init__(self, optimizer: torch.optim.Optimizer, owner: PsaAccelerator) -> None:
        super().__init__(optimizer, device_placement=False)
        self._owner = owner

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise UsageError("optimizer.step(closure): call backward() before it")
        self._owner._end_step()


class _Scheduler:
    """The script's scheduler: servers follow it, this shows its rates."""

    def __init__(self, scheduler: Any, owner: PsaAccelerator) -> None:
        self.scheduler, self._owner = scheduler, owner

    def step(self, *args: Any, **kwargs: Any) -> None:
        self._owner._tick(bool(args or kwargs))
        self._owner._show_rates()

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.scheduler.optimizer.param_groups]


class _Passes:
    """The worker's batches, one pass over the data after the other; passes that the job has behind it are empty."""

    def __init__(self, loader: DataLoader[Any], owner: PsaAccelerator) -> None:
        self._owner = owner
        self.dataset, self.batch_size = loader.dataset, loader.batch_size
        total = owner.split_batches and loader.batch_size is not None
        ranks = 1 if total else owner._ranks
        refuse_set_batch_size(owner._job, loader, ranks)
        self._length = (owner._steps or 0) if is_stream(loader) else epoch_steps(loader, ranks)
        if self._length < 1:
            raise UsageError("prepare(): a stream has no length: give PsaAccelerator(…, steps=…)")
        self._batches = owner.worker.batches(loader, loader.batch_size if total else None)
        self._passes = 0
        self._kept: list[Any] = []

    def __len__(self) -> int:
        """Steps of a pass."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        owner, worker = self._owner, self._owner.worker
        self._passes += 1
        end = self._passes * self._length
        while worker.version < end:
            if not self._kept:
                self._kept.extend(batch for batch in (next(self._batches, None),) if batch is not None)
            if not self._kept or worker.version >= end:
                return
            seed_everything(
                owner._seed, RankStep(worker.version, worker.rank), "compute"
            )  # another pass may have drawn
            owner._show_rates()
            owner._has_batch = True
            yield send_to_device(self._kept.pop(), owner.device)
