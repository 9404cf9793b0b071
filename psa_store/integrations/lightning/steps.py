"""The batches of a worker as the iterations of the Trainer, which is moved to where the job is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from psa_store.errors import UsageError
from psa_store.integrations.lightning import place
from psa_store.integrations.ranks import epoch_steps
from psa_store.integrations.rates import FollowedOptimizer
from psa_store.worker import Worker
from psa_store.worker.batches import RankStep, seed_everything
from psa_store.worker.streams import is_stream


@dataclass(frozen=True, slots=True)
class Length:
    """``steps`` of the job, None for no end; ``epoch_steps`` of one pass over the data."""

    steps: int | None
    epoch_steps: int


class StepLoader:
    """What the Trainer iterates: a batch for each step, and as many steps an epoch as the data have."""

    def __init__(self, data: DataLoader[Any], ranks: int, max_steps: int) -> None:
        self.data = data
        self.steps: Steps | None = None
        self._length = max_steps if is_stream(data) else epoch_steps(data, ranks)
        if self._length < 1:
            raise UsageError("PsaStrategy: a stream has no length: give max_steps, of which it makes one epoch")

    @property
    def dataset(self) -> Any:
        return self.data.dataset

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """The same through all epochs."""
        return self

    def __next__(self) -> Any:
        assert self.steps is not None
        return self.steps.next_batch()


class Steps:
    """The batches of a worker as the steps of the Trainer, which is moved to where the job is."""

    def __init__(
        self, trainer: Any, worker: Worker, followed: FollowedOptimizer, length: Length, seed: int, data: Any
    ) -> None:
        self._trainer, self._worker, self._followed, self._length, self._seed = trainer, worker, followed, length, seed
        self._began_with = deepcopy(call._call_callbacks_state_dict(trainer))
        self._batches: Any = worker.batches(data)
        self._closing = ExitStack()
        self._closing.enter_context(followed.ticks_taken(lambda: self._show_rates(worker.version)))
        self._has_batch = False
        self.further: tuple[Any] | None = None
        """The present batch, if it is not the one that the Trainer has."""
        self.left_out = False
        """Whether ``training_step`` returned None for the present batch."""
        self._counted = self._handled = 0
        """Versions: that which the Trainer counts in the present iteration; the one whose validation is through."""
        self._take()
        version = worker.version
        self._restore()
        # Where nothing is left to do, the Trainer still has to come to its hooks of the last version.
        self._move(place.before(version if self._has_batch else max(0, version - 1), length.epoch_steps))

    def close(self) -> None:
        """End the processes that load data; the scheduler is the script's again."""
        self._closing.close()
        self._batches.close()

    def _take(self) -> None:
        """Wait for the next batch; there is none after the last step, and where this worker is to leave."""
        try:
            self._batch = next(self._batches)
            self._has_batch = True
        except StopIteration:
            self._has_batch = False

    def next_batch(self) -> Any:
        """The batch with which an iteration begins.

        Raises:
            StopIteration: the epoch, or all, ends here.
        """
        self.further = None
        if not self._has_batch:
            self._take()
        worker, epoch_steps = self._worker, self._length.epoch_steps
        version = worker.version
        if version != self._handled:  # the first one here, or one to which the job went while this process waited
            self._restore()
            self._handled = version
            if version and (self._has_batch or worker.finished):
                self._move(place.after(version, epoch_steps))
                self._trainer.fit_loop.epoch_loop.on_advance_end(self._trainer.fit_loop._data_fetcher)
                if version % epoch_steps == 0:
                    raise StopIteration  # the Trainer ends the epoch, and comes again
        if not self._has_batch:
            self._stop()
        if not self._has_batch or (self._trainer.should_stop and self._trainer.fit_loop._can_stop_early):
            raise StopIteration
        seed_everything(self._seed, RankStep(version, worker.rank), "compute")  # hooks may have drawn
        self._move(place.before(version, epoch_steps))
        self._counted = version + 1
        return self._batch

    def hand_over(self, loss: Any) -> bool:
        """End the present batch; returns whether it was rank 0's."""
        worker = self._worker
        self._followed.check()
        self._has_batch = False
        main = worker.rank == 0
        if main:
            worker.state["callbacks"] = deepcopy(call._call_callbacks_state_dict(self._trainer))
        if self.left_out:
            worker.skip()
        else:
            worker.step(loss)
        return main

    def same_step(self) -> bool:
        """Take the next rank's batch if it is of the same step; else let the Trainer count the present version."""
        worker = self._worker
        if worker.version == self._counted - 1:
            self._take()
            if self._has_batch and worker.version == self._counted - 1:
                self.further = (self._transferred(self._batch),)
                return True
        if worker.version != self._counted:  # the job went elsewhere
            self._restore()
        if not self._has_batch and worker.version < self._counted:
            self._stop()
        self._move(place.within(worker.version, self._length.epoch_steps))
        self._handled = worker.version
        return False

    def _transferred(self, batch: Any) -> Any:
        """As the Trainer does with the first one."""
        strategy = self._trainer.strategy
        batch = strategy.precision_plugin.convert_input(batch)
        batch = strategy.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return strategy.batch_to_device(batch, dataloader_idx=0)

    def _move(self, to: place.Place) -> None:
        if self._worker.steps != self._length.steps:  # `psa job set` has said so
            place.end_at(self._trainer, self._worker.steps)
            self._length = replace(self._length, steps=self._worker.steps)
        place.move(self._trainer, to)
        self._show_rates(to.done)
        rank_zero_only.rank = self._trainer.strategy.global_rank  # of loggers and messages

    def _show_rates(self, step: int) -> None:
        self._followed.show(step, self._worker.lr_at(step))

    def _restore(self) -> None:
        """Let callbacks know what they knew when this version was made."""
        known: Mapping[str, Any] = self._worker.state["callbacks"] or self._began_with
        call._call_callbacks_load_state_dict(self._trainer, {"callbacks": known})
        for callback in self._trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in known:  # it leaves this one out
                callback.current_score = deepcopy(known[callback.state_key]["current_score"])

    def _stop(self) -> None:
        """End the fit before its last step: this worker was told to leave."""
        if not self._worker.finished:
            self._trainer.should_stop = True
            self._trainer.fit_loop.min_epochs = self._trainer.fit_loop.epoch_loop.min_steps = None
