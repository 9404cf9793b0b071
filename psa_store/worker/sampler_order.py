"""The samples that torch's samplers choose, as a pure function of (seed, data epoch), so that any process finds them.

The sampler of a DataLoader is run once for each data epoch, with torch's, numpy's and Python's random numbers, and a
generator of its own, seeded for that epoch. All ranks together walk through what it gives. A sampler that gives another
order when it is run again is refused, as is one that makes a part for one process of many: ranks have their parts here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from psa_store.errors import UsageError
from psa_store.job.position import Reading
from psa_store.job.sampling import SampleOrder, stream_seed
from psa_store.worker.randomness import seed_all


def order_of(loader: DataLoader[Any], seed: int, *, ranks: int, batch_size: int | None) -> SampleOrder | SamplerOrder:
    """The order that a DataLoader asks for. ``batch_size``: of all ranks; None where the loader makes its own batches.

    Raises:
        UsageError: an order that cannot be found again, or batches that cannot be shared out.
    """
    n = len(loader.dataset)  # type: ignore[arg-type]
    if batch_size is None:
        return SamplerOrder(loader.batch_sampler, seed, samples=n, ranks=ranks)
    sampler = loader.sampler
    order = SampleOrder(seed, ranks=ranks, batch_size=batch_size, n=n)  # checks the numbers, too
    shuffles = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == n
    if shuffles and not loader.drop_last:
        return order
    chosen = _Shuffled(seed, n) if shuffles else sampler
    return SamplerOrder(chosen, seed, samples=n, ranks=ranks, batch_size=batch_size, drop_last=loader.drop_last)


class SamplerOrder:
    """What a sampler gives, epoch after epoch, all of the same length. Not thread-safe.

    Args:
        samples: of the data set.
        batch_size: samples of a step, which the ranks share; None: the sampler gives batches, and each rank takes one.
        drop_last: whether the samples at the end of an epoch that make no whole step are left out; otherwise a step may
            span the end of an epoch.
    """

    def __init__(
        self,
        sampler: Any,
        seed: int,
        *,
        samples: int,
        ranks: int,
        batch_size: int | None = None,
        drop_last: bool = False,
    ) -> None:
        if isinstance(sampler, DistributedSampler) or isinstance(getattr(sampler, "sampler", None), DistributedSampler):
            raise UsageError(
                "DistributedSampler: psa shares samples out among the ranks itself; write DataLoader(…, shuffle=True)"
            )
        self._sampler = sampler
        self._seed = seed
        self._makes_batches = batch_size is None
        self._made: dict[int, Sequence[Any]] = {}
        first = self._run(0)
        self._length = len(first)
        if not self._length:
            raise UsageError(f"{self._name} gives no samples")
        if self._run(0) != first:
            raise UsageError(
                f"{self._name} gives another order when it is run again with the same seeds, so no process could find "
                "the samples of a step again: draw its random numbers from torch, numpy or random when it is iterated"
            )
        batch = ranks if batch_size is None else batch_size
        self.reading = Reading(batch, self._length, samples, drop_last, counts_batches=self._makes_batches)
        """How a job reads that goes through this order from its first step on."""
        if drop_last and self._length < batch:
            raise UsageError(f"drop_last=True: {self._length} samples make no batch of {batch_size}")

    def at(self, position: int, count: int) -> Sequence[Any]:
        """What a rank computes that takes so many samples from this position on, as the dataset takes it.

        Where the sampler gives batches, these are counted, and a rank takes one.
        """
        if self._makes_batches:
            assert count == 1
            batch: Sequence[Any] = self._at(position)
            return batch
        return [self._at(position + i) for i in range(count)]

    def _at(self, position: int) -> Any:
        """What is at this position, counted over all epochs."""
        epoch, within = divmod(position, self._length)
        if epoch not in self._made:
            made = self._run(epoch)
            if len(made) != self._length:
                raise UsageError(
                    f"{self._name} gives {len(made)} in data epoch {epoch}, and {self._length} in the first: the place "
                    "of a step could not be found without all epochs before it"
                )
            # A step may span the end of an epoch: keep the one before, too.
            self._made = {each: kept for each, kept in self._made.items() if abs(each - epoch) == 1} | {epoch: made}
        return self._made[epoch][within]

    def _run(self, epoch: int) -> Sequence[Any]:
        sampler, value = self._sampler, stream_seed(self._seed, epoch, 0, "sampler")
        seed_all(value)
        for each in (sampler, getattr(sampler, "sampler", sampler)):
            if isinstance(getattr(each, "generator", None), torch.Generator):
                each.generator.manual_seed(value)
            if hasattr(each, "set_epoch"):
                each.set_epoch(epoch)
        if type(sampler) is SequentialSampler:
            return range(len(sampler))
        made = list(sampler)
        return array("q", made) if all(type(each) is int for each in made) else made

    @property
    def _name(self) -> str:
        return type(self._sampler).__name__


class _Shuffled:
    """The order of psa itself, an epoch at a time."""

    def __init__(self, seed: int, n: int) -> None:
        self._order = SampleOrder(seed, ranks=1, batch_size=n, n=n)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self._order.indices(self._epoch, 0))
