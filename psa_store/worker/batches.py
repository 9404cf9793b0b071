"""Batches for (step, rank), each a pure function of the job's seed and those two numbers.

That is what makes elasticity exact: the samples and random numbers of a rank are the same in whichever process it is
computed, and however often. The order of samples comes from :mod:`psa_store.job.sampling`, or from the sampler of a
DataLoader (see :mod:`psa_store.worker.sampler_order`), which lends its dataset, collate function and processes as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from psa_store.errors import UsageError
from psa_store.job.position import DataRecord, Reading, begin
from psa_store.job.sampling import SampleOrder, stream_seed
from psa_store.worker.loader_processes import EndsWithWorker
from psa_store.worker.randomness import seed_all
from psa_store.worker.sampler_order import SamplerOrder, order_of


@dataclass(frozen=True, slots=True)
class RankStep:
    """One batch to make: which step and rank it is for."""

    step: int
    rank: int


def seed_everything(seed: int, rank_step: RankStep, purpose: str) -> None:
    """Make torch's, numpy's and Python's random numbers a function of (seed, step, rank, purpose)."""
    seed_all(stream_seed(seed, rank_step.step, rank_step.rank, purpose))


class _Fetched(Dataset[Any]):
    """Maps a rank step to its collated batch, in this process or in a DataLoader's."""

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        seed: int,
        ranks: int,
        order: SampleOrder | SamplerOrder,
    ) -> None:
        self._dataset = dataset
        self._collate = collate
        self._seed = seed
        self._order = order
        self._ranks = ranks
        self.record = begin(order.reading)

    def __getitem__(self, rank_step: RankStep) -> Any:
        indices = self._indices(rank_step)  # before: a sampler needs seeds of its own
        seed_everything(self._seed, rank_step, "data")
        fetch_many = getattr(self._dataset, "__getitems__", None)
        samples = fetch_many(indices) if fetch_many else [self._dataset[index] for index in indices]
        return self._collate(samples)

    def _indices(self, rank_step: RankStep) -> Sequence[Any]:
        return self._order.at(*self.record.place_of(rank_step.step, rank_step.rank, self._ranks))


@dataclass(frozen=True, slots=True)
class _Foresight:
    """The rank steps that come if nothing changes: the same ranks, in each round all steps of one after the other."""

    first: RankStep
    ranks: Sequence[int]
    round_steps: int

    def __iter__(self) -> Iterator[RankStep]:
        first, length = self.first, self.round_steps
        low = first.step - first.step % length
        yield from (RankStep(step, first.rank) for step in range(first.step, low + length))
        ranks = [rank for rank in self.ranks if rank > first.rank]
        while True:
            yield from (RankStep(step, rank) for rank in ranks for step in range(low, low + length))
            low, ranks = low + length, list(self.ranks)


class Batches:
    """Make the batch of any rank step. With worker processes, read ahead, and start anew when the plan changes.

    Args:
        data: a map-style dataset, which is shuffled, or a DataLoader over one, whose sampler decides.
        batch_size: samples per step over *all* ranks; None takes ``DataLoader.batch_size`` times the ranks, or, from a
            ``batch_sampler``, a batch for each rank.
        round_steps: steps that a rank makes in a row.
        record_for: the job's record, of which this reading is the newest; None: one that begins with it.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int | None,
        *,
        seed: int,
        ranks: int,
        round_steps: int = 1,
        record_for: Callable[[Reading], DataRecord] | None = None,
    ) -> None:
        loader = data if isinstance(data, DataLoader) else None
        dataset: Any = loader.dataset if loader is not None else data
        if not hasattr(dataset, "__getitem__"):
            raise UsageError(
                f"batches() of a {type(dataset).__name__}: give a map-style dataset (with __len__ and __getitem__), a "
                "stream (with __iter__), or a DataLoader over one of them"
            )
        makes_batches = loader is not None and loader.batch_size is None and loader.batch_sampler is not None
        if batch_size is None and loader is not None and loader.batch_size is not None:
            batch_size = loader.batch_size * ranks
        if makes_batches and batch_size is not None:
            raise UsageError(f"batch_size={batch_size}: the DataLoader has a batch_sampler, which makes the batches")
        if batch_size is None and not makes_batches:
            raise UsageError("batches() needs batch_size=: the number of samples per step over all ranks")
        # Both refuse what cannot be shared out before training starts.
        if loader is not None:
            order = order_of(loader, seed, ranks=ranks, batch_size=batch_size)
        else:
            assert batch_size is not None
            order = SampleOrder(seed, ranks=ranks, batch_size=batch_size, n=len(dataset))
        collate = loader.collate_fn if loader is not None else default_collate
        self._fetched = _Fetched(dataset, collate, seed, ranks, order)
        self.reading = order.reading
        self._record_for = record_for
        self._ranks = ranks
        self._samples_made = len(order.at(0, 1)) if batch_size is None else None
        self._round_steps = round_steps
        self._loader = loader if loader is not None and loader.num_workers > 0 else None
        self._ahead: Iterator[Any] | None = None
        self._expected: Iterator[RankStep] = iter(())

    @property
    def samples(self) -> int:
        """In the batch of one rank step, as they are now; those of a batch_sampler may differ from its first."""
        made = self._samples_made
        return self._fetched.record.reading.batch // self._ranks if made is None else made

    def get(self, rank_step: RankStep, ranks: Sequence[int]) -> Any:
        """The batch of ``rank_step``; ``ranks`` are all ranks that this worker holds, for reading ahead."""
        if self._record_for is not None and (record := self._record_for(self.reading)) is not self._fetched.record:
            self._fetched.record = record
            self._ahead = None  # its processes have the former one
        if self._loader is None:
            return self._fetched[rank_step]
        if self._ahead is None or next(self._expected) != rank_step:
            self._restart(self._loader, rank_step, ranks)
        assert self._ahead is not None
        return next(self._ahead)

    def close(self) -> None:
        self._ahead = None

    def _restart(self, loader: DataLoader[Any], rank_step: RankStep, ranks: Sequence[int]) -> None:
        self._ahead = None  # ends the worker processes of the former one
        self._expected = iter(_Foresight(rank_step, ranks, self._round_steps))
        next(self._expected)
        self._ahead = iter(
            DataLoader(
                self._fetched,
                batch_size=None,
                sampler=_Foresight(rank_step, ranks, self._round_steps),
                num_workers=loader.num_workers,
                pin_memory=loader.pin_memory,
                worker_init_fn=EndsWithWorker(loader.worker_init_fn),
                multiprocessing_context=loader.multiprocessing_context,
                prefetch_factor=loader.prefetch_factor,
                timeout=loader.timeout,
            )
        )
