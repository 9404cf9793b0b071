"""The Trainer, and its loop over a worker's batches; see the package."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerState

from psa_store.checkpoint.catalog import read_job
from psa_store.config import load_settings
from psa_store.errors import UsageError
from psa_store.integrations.ranks import ranks_of
from psa_store.integrations.transformers.arguments import refuse
from psa_store.integrations.transformers.rate import FollowedRate, schedule_of
from psa_store.optim import Optimizer
from psa_store.optim.from_torch import from_torch
from psa_store.storage import RedisStore
from psa_store.worker import Worker
from psa_store.worker.randomness import generators_kept

_KEPT = ("best_metric", "best_global_step", "total_flos", "num_input_tokens_seen")
_NONE = -1
_STATE_FILE = "trainer_state.json"


class PsaTrainer(Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` whose gradients are reduced, and whose parameters are updated, by psa's servers.

    Start the script with `psa run`. ``job`` names the job; None takes ``PSA_JOB``. Running the script again resumes it.

    Args:
        job: name of the job; the other arguments are the Trainer's.

    Raises:
        UsageError: an argument asks for what psa does otherwise, or can not do; the message says what to write.
    """

    control: Any
    current_flos: float

    def __init__(self, *args: Any, job: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name = job or load_settings().job
        if not name:
            raise UsageError("the job has no name: PsaTrainer(…, job='my-gpt'), or set PSA_JOB")
        self._job = name
        self._worker: Worker | None = None
        self._was_main = True
        """Whether this process computed rank 0 in the last step: it saves what is saved after training."""
        self._handled = self._begun = self._save_owed = _NONE
        """Versions: the one that was handled last, whose next step has begun, that is to be saved."""
        refuse(self)

    # --- the Trainer's questions about processes

    def is_world_process_zero(self) -> bool:
        """Whether this process prints and saves: the one that computes rank 0."""
        worker: Worker | None = getattr(self, "_worker", None)  # it is asked before __init__ is through
        return getattr(self, "_was_main", True) if worker is None else worker.is_main

    def is_local_process_zero(self) -> bool:
        return self.is_world_process_zero()

    # --- data, optimizer and rate by the Trainer's arguments

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A loader of what one rank computes in one step: a list of micro-batches."""
        args, dataset = self.args, self.train_dataset
        if dataset is None:
            raise UsageError("PsaTrainer.train() needs train_dataset=")
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise UsageError("train_dataset: a stream; give a map-style dataset, whose samples can be found again")
        plain = super()._get_collator_with_removed_columns(self.data_collator, description="training")
        if hasattr(dataset, "column_names"):  # of the package datasets: it need not read columns that nothing takes
            dataset, plain = self._remove_unused_columns(dataset, description="training"), self.data_collator
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return DataLoader(
            dataset,
            batch_size=samples,
            sampler=self._get_train_sampler(dataset),
            collate_fn=_MicroBatches(plain, args.per_device_train_batch_size, samples),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            drop_last=args.dataloader_drop_last,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _psa_optimizer(self, steps: int) -> Optimizer:
        """What servers apply: the Trainer's optimizer, schedule and limit of the norm."""
        optimizer = self.create_optimizer()
        clip = self.args.max_grad_norm
        found, base = from_torch(optimizer, self.model), max(float(each["lr"]) for each in optimizer.param_groups)
        self._schedule = schedule_of(self.create_scheduler(steps, optimizer), base, steps)
        self.lr_scheduler = FollowedRate(lambda: self._lr_at(max(0, self._handled)))
        return replace(found, lr=self._schedule, clip_grad_norm=clip if clip and clip > 0 else None)

    def _lr_at(self, step: int) -> float:
        return self._schedule.at(step) if self._worker is None else self._worker.lr_at(step)

    # --- the loop

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train the job to its end, from where it is.

        Args:
            resume_from_checkpoint: True, False and None mean the same: a job that exists goes on. A folder must be that
                of the version at which the job is.
        """
        if trial is not None:
            raise UsageError("hyperparameter_search: start a job of its own for each trial")
        if isinstance(resume_from_checkpoint, (str, Path)):
            self._check_resume(Path(resume_from_checkpoint))
        return super().train(None, None, ignore_keys_for_eval)

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        started_s = time.time()
        loader = self.get_train_dataloader()
        ranks = ranks_of(self._job)
        samples = loader.batch_size * ranks if loader.batch_size else ranks
        length = len(loader.sampler)  # type: ignore[arg-type]
        epoch_steps = max(1, length // samples if loader.drop_last else math.ceil(length / samples))
        epochs = self.args.num_train_epochs
        steps = self.args.max_steps if self.args.max_steps > 0 else math.ceil(epochs * epoch_steps)
        self._begin(steps, epoch_steps)
        model = self.accelerator.prepare_model(self.model)  # autocast, and no more: it is one process
        self.model_wrapped = model
        optimizer = self._psa_optimizer(steps)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = loader
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        with Worker(
            self._job,
            self.model,
            optimizer=optimizer,
            ranks=ranks,
            steps=steps,
            seed=seed,
            state=self._own_state(),
            tokenizer=self.processing_class,
        ) as worker:
            self._worker = worker
            try:
                self._train(worker, model, loader, _Fixed(epoch_steps, started_s, ignore_keys_for_eval))
            finally:
                self._worker = None
        self._find_best()
        return self._finalize_training(None, steps * samples, started_s)

    def _begin(self, steps: int, epoch_steps: int) -> None:
        self.state = TrainerState(stateful_callbacks=[*self._callbacks(), self.control])
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(self.args, steps)
        self.state.init_training_references(self, steps, math.ceil(steps / epoch_steps), None)
        self._tr_loss = torch.tensor(0.0, device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = 0.0, 0
        self._initial_global_step = self._initial_num_input_tokens_seen = 0
        self._handled = self._begun = _NONE

    def _train(self, worker: Worker, model: Any, loader: DataLoader[Any], fixed: _Fixed) -> None:
        for micro_batches in worker.batches(loader):
            with generators_kept():  # the batch is here, and its random numbers are those of its step and rank
                if worker.version != self._handled:  # the first one here, or one to which the job went back
                    self._handle(worker, model, fixed)
                if worker.rank == 0 and self._save_owed == worker.version and not self.control.should_training_stop:
                    self._save_checkpoint(model, None)  # its saver died in doing so
            if self.control.should_training_stop:
                break
            if worker.version != self._begun:
                self._begun, self._was_main = worker.version, False
                self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            before = worker.version
            self._compute(worker, model, micro_batches)
            if worker.version != before:
                self._handle(worker, model, fixed)
        if worker.finished and worker.version != self._handled:  # it was finished before this process began
            self._was_main = worker.is_main
            self._handle(worker, model, fixed)

    def _compute(self, worker: Worker, model: Any, micro_batches: list[Any]) -> None:
        """Make one step of one rank: the Trainer's losses and gradients; servers clip and update."""
        items = self._get_num_items_in_batch(micro_batches, self.args.device)
        weight = float(items) if items is not None and self.args.average_tokens_across_devices else 1.0
        loss = torch.zeros((), device=self.args.device)
        self.current_gradient_accumulation_steps = len(micro_batches)
        for index, inputs in enumerate(micro_batches if weight else []):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else worker.accumulate():
                loss += self.training_step(model, inputs, items)
            if worker.rank == 0:
                self.current_flos += float(self.floating_point_ops(inputs)) * worker.ranks
                self._track_num_input_tokens(inputs)
            if not last:
                self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        if worker.rank == 0:
            self._was_main = True
            if not self.args.logging_nan_inf_filter or bool(loss.isfinite()):
                self._tr_loss += loss
            worker.state.update(self._own_state())
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        if weight:
            worker.step(loss, weight=weight)
        else:  # no label counts
            worker.skip()
        self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)

    def _handle(self, worker: Worker, model: Any, fixed: _Fixed) -> None:
        """Log, evaluate and save as callbacks want it, with what the Trainer knew when this version was made."""
        first = self._handled == _NONE
        assert worker.steps is not None
        self.state.max_steps = worker.steps  # `psa job set` may have changed it
        self._restore(worker.state)
        version = self._handled = worker.version
        self.state.global_step, self.state.epoch = version, version / fixed.epoch_steps
        self.state.is_world_process_zero = self.state.is_local_process_zero = worker.is_main
        if first:
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
            if version:
                self._find_history()
            elif self.args.eval_on_start:
                self._evaluate(None, fixed.ignore_keys, skip_scheduler=True)
        if version:
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            self._tell(model, fixed)
            if version % fixed.epoch_steps == 0 or self.control.should_training_stop:
                self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
                self._tell(model, fixed)
        if self.control.should_epoch_stop:
            raise UsageError("a callback ended an epoch early, but the samples of a step follow from its number")
        if version % fixed.epoch_steps == 0 and not self.control.should_training_stop:
            self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)

    def _tell(self, model: Any, fixed: _Fixed) -> None:
        rate = self._lr_at(self.state.global_step - 1)
        self._maybe_log_save_evaluate(
            self._tr_loss, None, model, None, self.state.epoch, fixed.ignore_keys, fixed.started_s, learning_rate=rate
        )

    # --- what belongs to the version

    def _own_state(self) -> dict[str, Any]:
        kept = {name: getattr(self.state, name) for name in _KEPT}
        if kept["best_metric"] is not None:
            kept["best_metric"] = float(kept["best_metric"])
        return {
            **kept,
            "loss": float(self._tr_loss),
            "logged_loss": float(self._total_loss_scalar),
            "logged_step": self._globalstep_last_logged,
            "flos": float(self.current_flos),
            "callbacks": [each.state()["attributes"] for each in self._callbacks()],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        for name in _KEPT:
            setattr(self.state, name, state[name])
        self._find_best()
        self._tr_loss.fill_(state["loss"])
        self._total_loss_scalar, self._globalstep_last_logged = state["logged_loss"], state["logged_step"]
        self.current_flos = state["flos"]
        for callback, attributes in zip(self._callbacks(), state["callbacks"], strict=True):
            for name, value in attributes.items():
                setattr(callback, name, value)

    def _find_best(self) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(folder) if folder.is_dir() else None

    def _callbacks(self) -> list[Any]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, ExportableState)]

    def _find_history(self) -> None:
        """Go on with the log that the newest checkpoint folder has."""
        for folder in reversed(_folders(Path(self.args.output_dir))):
            path = folder / _STATE_FILE
            if path.is_file():
                entries = TrainerState.load_from_json(str(path)).log_history
                self.state.log_history = [each for each in entries if each.get("step", 0) < self.state.global_step]
                return

    # --- checkpoint folders: the model and the log; optimizer and generators are the job's

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._save_owed = self.state.global_step
        if self.is_world_process_zero():
            super()._save_checkpoint(model, trial)
            self._save_owed = _NONE

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model for ``from_pretrained``, in one process."""
        if self.is_world_process_zero():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None: ...

    def _save_scaler(self, output_dir: str) -> None: ...

    def _save_rng_state(self, output_dir: str) -> None: ...

    def _check_resume(self, folder: Path) -> None:
        version = _version_of(folder)
        with RedisStore.from_settings(load_settings()) as store:
            if not store.has_job(self._job):
                raise UsageError(
                    f"resume_from_checkpoint={str(folder)!r}: job {self._job!r} does not exist, and the folder has no "
                    "optimizer state. Load the model from it with from_pretrained, or `psa checkpoint import` an export"
                )
            newest = read_job(store, self._job).version_of(None)
        if version != newest:
            raise UsageError(
                f"resume_from_checkpoint={str(folder)!r}: job {self._job!r} is at version {newest}. Leave it out to go "
                f"on from there, or go back first: `psa checkpoint rollback {self._job} {version}`"
            )


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What is fixed for one call of ``train()``."""

    epoch_steps: int
    started_s: float
    ignore_keys: list[str] | None


class _MicroBatches:
    """Collates the samples of a rank's step as the micro-batches that the Trainer would make of them."""

    def __init__(self, collate: Callable[[list[Any]], Any], size: int, samples: int) -> None:
        self._collate = collate
        self._size = size
        self._samples = samples

    def __call__(self, samples: Sequence[Any]) -> list[Any]:
        if len(samples) != self._samples:
            raise UsageError(
                f"PsaTrainer: a rank's step has {len(samples)} samples, as `psa job set` says, but the Trainer counts "
                f"epochs by steps of {self._samples}: set batch_size to {self._samples} times the ranks again"
            )
        starts = range(0, len(samples), self._size)
        return [self._collate(list(samples[start : start + self._size])) for start in starts]


def _folders(output: Path) -> list[Path]:
    """Checkpoint folders, the oldest version first."""
    return sorted((each for each in output.glob("checkpoint-*") if _version_of(each) is not None), key=_version_of)


def _version_of(folder: Path) -> Any:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None
