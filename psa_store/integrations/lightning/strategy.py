"""The strategy of Lightning's Trainer; see the package."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from psa_store.config import load_settings
from psa_store.errors import UsageError
from psa_store.integrations.lightning.arguments import refuse, refuse_what_is_logged
from psa_store.integrations.lightning.steps import Length, StepLoader, Steps
from psa_store.integrations.ranks import ranks_of, refuse_set_batch_size
from psa_store.integrations.rates import FollowedOptimizer
from psa_store.job.average import Average
from psa_store.storage import RedisStore
from psa_store.worker import Worker

_SEED_VARIABLE = "PL_GLOBAL_SEED"
"""What ``lightning.seed_everything`` leaves."""
_STAMP = "psa"
"""The key of a checkpoint file that says of which job it is."""
_OF_THE_JOB = ("loops", "callbacks", "optimizer_states", "lr_schedulers")
"""Keys of a checkpoint file that tell what the job has."""


class PsaStrategy(Strategy):  # type: ignore[misc]
    """Reduce gradients and update parameters by psa's servers. Start the script with `psa run`.

    Args:
        job: name of the job; None takes ``PSA_JOB``. Running the script again resumes it.
        seed: root of all randomness of the job; None: that of ``lightning.seed_everything``, or 0.
        average: of the parameters, which servers keep: ``psa.ema(0.999)``.

    Raises:
        UsageError: the Trainer or the module asks for what psa does otherwise, or can not do; the message says what to
            write.
    """

    strategy_name = "psa"
    num_nodes = 1
    _layer_sync: Any = None
    is_distributed = False
    """The Trainer's word for data that are to be shared out; ``self.log`` drops ``sync_dist`` without."""

    def __init__(self, job: str | None = None, *, seed: int | None = None, average: Average | None = None) -> None:
        super().__init__()
        self._job_given, self._average = job, average
        self._seed = int(os.environ.get(_SEED_VARIABLE, "0")) if seed is None else seed
        self.parallel_devices: list[torch.device] | None = None
        """Set by the Trainer."""
        self._worker: Worker | None = None
        self._loader: StepLoader | None = None
        self._fit: _Fit | None = None
        self._was_main = True
        """Whether this process computed rank 0 in the last step: it saves what is saved after training."""

    # --- the Trainer's questions about processes

    @property
    def worker(self) -> Worker:
        """The worker of this process, from the Trainer's ``on_fit_start`` to the end of ``fit``."""
        if self._worker is None:
            raise UsageError("strategy.worker is there while fit runs")
        return self._worker

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else torch.device("cpu")

    @property
    def is_global_zero(self) -> bool:
        """Whether this process logs and saves: the one that computes rank 0."""
        worker = self._worker
        return self._was_main if worker is None or worker.finished else worker.is_main

    @property
    def global_rank(self) -> int:
        """0 in the process that logs and saves, else 1: ranks move from process to process."""
        return 0 if self.is_global_zero else 1

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return 1 if self._fit is None else self._fit.ranks

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return what was given: each process validates all samples, so all have the same."""
        return tensor

    def barrier(self, name: str | None = None) -> None:
        """Do nothing: steps are the barrier."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what was given: all processes run the same script."""
        return obj

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        raise UsageError(
            "all_gather: there is no process group, since a process may die at any time. Each process validates all "
            "samples, so nothing needs to be gathered there; in training_step a rank has its own batch only"
        )

    # --- life

    def model_to_device(self) -> None:
        self.model.to(self.root_device)

    def setup(self, trainer: Any) -> None:
        """Join the job, and take the first batch, with which its parameters come."""
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        module = self.lightning_module
        refuse(trainer, module, len(self.parallel_devices or [None]))
        job = self._job()
        self._loader = None
        clip, trainer.gradient_clip_val = trainer.gradient_clip_val, None  # servers clip; see teardown()
        self._fit = _Fit(trainer, ranks_of(job), clip)
        super().setup(trainer)  # which may have asked for the loader, to know the number of steps
        loader = self._train_loader(trainer)
        refuse_set_batch_size(job, loader.data, self._fit.ranks)
        length = _length(trainer, loader)
        if len(self.optimizers) != 1:
            raise UsageError(f"configure_optimizers: {len(self.optimizers)} optimizers; give one, with groups")
        followed = _followed(self.optimizers[0], self.lr_scheduler_configs, module, length)
        worker = Worker(
            job,
            module,
            optimizer=replace(followed.rule, clip_grad_norm=clip or None),
            ranks=self._fit.ranks,
            steps=length.steps,
            seed=self._seed,
            average=self._average,
            state={"callbacks": {}},
        )
        self._worker = worker.__enter__()
        loader.steps = Steps(trainer, worker, followed, length, self._seed, loader.data)
        self._was_main = worker.is_main

    def on_exception(self, exception: BaseException) -> None:
        """Leave the job; the supervisor learns why."""
        if self._worker is not None:
            error = None if isinstance(exception, SIGTERMException) else exception
            self._worker.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def teardown(self) -> None:
        """Leave the job. The module keeps its parameters."""
        if self._worker is not None:
            self._was_main = self.is_global_zero
            if self._loader is not None and self._loader.steps is not None:
                self._loader.steps.close()
            self._worker.close()
            self._worker = None
        if self._fit is not None:
            self._fit.trainer.gradient_clip_val = self._fit.clip
            self._fit = None
        super().teardown()

    def _job(self) -> str:
        name = self._job_given or load_settings().job
        if not name:
            raise UsageError("the job has no name: PsaStrategy('my-gpt'), or set PSA_JOB")
        return name

    # --- data

    def _train_loader(self, trainer: Any) -> StepLoader:
        trainer.fit_loop.setup_data()
        if self._loader is None:
            raise UsageError("PsaStrategy: fit() needs a train dataloader")
        return self._loader

    def process_dataloader(self, dataloader: Any) -> Any:
        """Give the Trainer one batch a step instead of a train dataloader; others stay as they are."""
        if self._fit is None or not self._fit.trainer.training:
            return dataloader
        if self._loader is not None:
            raise UsageError("PsaStrategy: several train dataloaders: make one data set of them")
        if not isinstance(dataloader, DataLoader):
            raise UsageError(f"PsaStrategy: a train dataloader of type {type(dataloader).__name__}: give a DataLoader")
        self._loader = StepLoader(dataloader, self._fit.ranks, self._fit.trainer.max_steps)
        return self._loader

    # --- a step

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's for the batch of the present rank."""
        assert self._fit is not None
        further = self.steps.further
        self.is_distributed = True
        try:
            output = super().training_step(*(args if further is None else (further[0], *args[1:])), **kwargs)
        finally:
            self.is_distributed = False
        refuse_what_is_logged(self._fit.trainer)
        self.steps.left_out = output is None
        # Lightning refuses None where the world is larger than one.
        return torch.zeros((), device=self.root_device, requires_grad=True) if output is None else output

    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Compute all ranks of this process, one after the other; ``closure`` runs training_step and backward."""
        computed_rank_0 = False
        while True:
            loss = closure()
            self.precision_plugin._after_closure(model or self.lightning_module, optimizer)  # its hooks
            computed_rank_0 |= self.steps.hand_over(loss)
            self._was_main = computed_rank_0
            if not self.steps.same_step():
                return loss

    @property
    def steps(self) -> Steps:
        assert self._loader is not None and self._loader.steps is not None
        return self._loader.steps

    # --- checkpoint files: the module, and what Lightning knows; optimizer and generators are the job's

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The numbers of the groups, without state: that is the servers'."""
        return {**optimizer.state_dict(), "state": {}}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a file of Lightning's, in one process."""
        if self._worker is not None:
            checkpoint = {**checkpoint, _STAMP: {"job": self._job(), "version": self._worker.version}}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file of Lightning's; to ``fit`` it only says that the job goes on."""
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return checkpoint
        job = self._job()
        of = checkpoint.get(_STAMP, {}).get("job")
        with RedisStore.from_settings(load_settings()) as store:
            if of != job or not store.has_job(job):
                raise UsageError(
                    f"fit(ckpt_path={str(checkpoint_path)!r}): it has no optimizer state that job {job!r} could go on "
                    "with. Leave ckpt_path out: a job goes on by itself, and `psa checkpoint rollback` goes back. To "
                    f"begin a job with these weights: {type(self.lightning_module).__name__}.load_from_checkpoint(…)"
                )
        kept = {key: value for key, value in checkpoint.items() if key not in _OF_THE_JOB}
        return {**kept, "lr_schedulers": [], "state_dict": self.lightning_module.state_dict()}


@dataclass(frozen=True, slots=True)
class _Fit:
    """What is fixed for one call of ``fit``."""

    trainer: Any
    ranks: int
    clip: float | None


def _followed(optimizer: torch.optim.Optimizer, configs: list[Any], module: Any, length: Length) -> FollowedOptimizer:
    if not configs:
        return FollowedOptimizer(optimizer, None, module, length.steps)
    if len(configs) > 1:
        raise UsageError("configure_optimizers: several schedulers: make one of them, such as a SequentialLR")
    (config,) = configs
    if config.interval == "step" and config.frequency != 1:
        raise UsageError(f"lr_scheduler: frequency={config.frequency} of steps: make it with numbers that count steps")
    tick_steps = 1 if config.interval == "step" else length.epoch_steps * config.frequency
    return FollowedOptimizer(optimizer, config.scheduler, module, length.steps, tick_steps)


def _length(trainer: Any, loader: StepLoader) -> Length:
    epochs, most = trainer.fit_loop.max_epochs, trainer.max_steps
    ends = [steps for steps in (most, -1 if epochs in (None, -1) else epochs * len(loader)) if steps != -1]
    return Length(min(ends) if ends else None, len(loader))


StrategyRegistry.register(
    PsaStrategy.strategy_name, PsaStrategy, description="parameters and optimizer on psa's servers"
)
