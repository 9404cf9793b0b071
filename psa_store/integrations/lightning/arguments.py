"""Arguments of the Trainer, and methods of the module, that psa can not follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from psa_store.errors import UsageError

_CALLBACKS = {
    "GradientAccumulationScheduler": "the number of ranks is fixed: `psa run --ranks N`",
    "StochasticWeightAveraging": "servers keep an average: PsaStrategy(…, average=psa.ema(0.999))",
    "WeightAveraging": "servers keep an average: PsaStrategy(…, average=psa.ema(0.999))",
    "Timer": "each process has a time of its own: give max_steps. A run that is stopped goes on with the same command",
    "LearningRateFinder": "find the rate with a Trainer without this strategy",
    "BatchSizeFinder": "find the batch size with a Trainer without this strategy",
    "ModelPruning": "it writes to parameters, which servers own",
    "BaseFinetuning": "it unfreezes parameters while the job runs: start another job from this one's export",
}
_METHODS = {
    "optimizer_step": "servers make the step; a rate that warms up is a scheduler with interval 'step', and gradients "
    "are changed in on_before_optimizer_step",
    "configure_gradient_clipping": "it would clip each rank's gradient, not their mean: Trainer(gradient_clip_val=…) "
    "clips the mean; to change each rank's own, use on_before_optimizer_step",
    "lr_scheduler_step": "servers follow the scheduler by its steps: leave it out",
}


def refuse(trainer: Any, module: Any, devices: int) -> None:
    """Raise UsageError for the first thing that psa can not follow, with what to do instead."""
    for what, why in _refused(trainer, module, devices):
        raise UsageError(f"PsaStrategy: {what}: {why}")


def _refused(trainer: Any, module: Any, devices: int) -> Iterator[tuple[str, str]]:
    accumulate, precision = trainer.accumulate_grad_batches, trainer.precision
    limit = trainer.limit_train_batches
    if devices != 1:
        yield f"{devices} devices in one process", "start one worker a device: devices=1, and CUDA_VISIBLE_DEVICES"
    if trainer.num_nodes != 1:
        yield f"num_nodes={trainer.num_nodes}", "start workers on each machine, see the how-to of several machines"
    if trainer.strategy._layer_sync is not None:
        yield "sync_batchnorm=True", "buffers are those of rank 0; leave it out"
    if not module.automatic_optimization:
        yield (
            "automatic_optimization=False",
            "let training_step return the loss. For two optimizers give one with two groups: parameters that get no "
            "gradient in a step are left out of it; for anything else write the loop with psa.Worker",
        )
    if accumulate != 1:
        yield (
            f"accumulate_grad_batches={accumulate}",
            f"start with {accumulate} times as many ranks: `psa run --workers 1 --ranks {accumulate}`. A worker "
            "computes its ranks one after the other, in the memory of one",
        )
    if precision in ("16-mixed", "16-true"):
        yield f"precision={precision!r}", "gradients of float16 need a scaler: use 'bf16-mixed'"
    if str(trainer.gradient_clip_algorithm or "norm") not in ("norm", "GradClipAlgorithmType.NORM"):
        yield "gradient_clip_algorithm='value'", "servers clip the norm of the mean: use 'norm'"
    if trainer.fast_dev_run:
        yield f"fast_dev_run={trainer.fast_dev_run}", "use it with a Trainer without this strategy"
    if trainer.overfit_batches:
        yield f"overfit_batches={trainer.overfit_batches}", "give a smaller data set: torch.utils.data.Subset"
    if isinstance(limit, int) or limit != 1.0:
        yield (
            f"limit_train_batches={limit}",
            "the place in the data is counted in samples: give max_steps, or a torch.utils.data.Subset",
        )
    if trainer.reload_dataloaders_every_n_epochs:
        yield "reload_dataloaders_every_n_epochs", "the data belong to the job"
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        yield "training_step(dataloader_iter)", "a batch comes with the parameters of its step: take batch, batch_idx"
    for name, why in _METHODS.items():
        if is_overridden(name, module):
            yield f"{type(module).__name__}.{name}", why
    for callback in trainer.callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in _CALLBACKS and kind.__module__.startswith("lightning."):
                yield kind.__name__, _CALLBACKS[kind.__name__]


def refuse_what_is_logged(trainer: Any) -> None:
    """Raise UsageError if what ``training_step`` has logged would count as that of all ranks."""
    logged = [result.meta for result in trainer.fit_loop.epoch_loop._results.values()]
    for meta in logged:
        if meta.sync.should:
            raise UsageError(
                f"self.log({meta.name!r}, sync_dist=True) while training: there is no process group. Leave sync_dist "
                "out: the log has the ranks of the process that computes rank 0; `psa status` has the loss of all"
            )
    for callback in trainer.early_stopping_callbacks:
        if any(meta.name == callback.monitor for meta in logged):
            raise UsageError(
                f"EarlyStopping(monitor={callback.monitor!r}): training_step logs it, and each process knows that of "
                "its own ranks, so one would stop and others not: monitor what validation_step logs"
            )
