"""Batches of a stream: a dataset that can only be read from its beginning on, and has no length.

The stream is a sequence of units, pass after pass: samples, or, of a DataLoader, the batches that it makes. Which units
a rank takes in a step is the same function of the job's position as for other data. A process reads on until it comes
to them, and leaves the others out; so each unit is trained on once, whichever process computes which rank, and however
often one dies. A process that begins late, or goes back, reads from the beginning: it says how far it is, how
fast, and how long it will take.

So a stream must give the same each time. Its random numbers are the job's, seeded by the pass; what can only be read
once is refused, and one that begins otherwise when it is read again is found out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, default_collate
from xxhash import xxh3_64

from psa_store import logs
from psa_store.errors import UsageError
from psa_store.job.position import DataRecord, Reading, begin
from psa_store.job.sampling import stream_seed
from psa_store.observe.formatting import duration
from psa_store.optim.tensors import as_bytes
from psa_store.worker.batches import RankStep, seed_everything
from psa_store.worker.loader_processes import EndsWithWorker
from psa_store.worker.randomness import HostGenerators, seed_all

_ENDLESS = 1 << 62
"""The length of a pass over a stream, as far as the job's record is concerned."""
_SAY_AFTER_S = 5.0


def is_stream(data: Any) -> bool:
    """Whether ``data`` can only be read one after the other."""
    if isinstance(data, DataLoader):
        return isinstance(data.dataset, IterableDataset) or not hasattr(data.dataset, "__getitem__")
    return isinstance(data, IterableDataset) or (not hasattr(data, "__getitem__") and hasattr(data, "__iter__"))


class StreamBatches:
    """The batch of any rank step, as :class:`psa_store.worker.batches.Batches` gives it.

    Args:
        data: an iterable dataset, or a DataLoader over one, which makes the batches.
        batch_size: samples per step over *all* ranks; None with a DataLoader, of which each rank takes a batch.
        record_for: the job's record, of which this reading is the newest; None: one that begins with it.

    Raises:
        UsageError: it can be read once only, or batches cannot be shared out.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int | None,
        *,
        seed: int,
        ranks: int,
        record_for: Callable[[Reading], DataRecord] | None = None,
    ) -> None:
        self._seed = seed
        self._ranks = ranks
        self._record_for = record_for
        self._source: Any = data
        self._collate: Callable[[list[Any]], Any] | None = None
        if isinstance(data, DataLoader):
            if batch_size is not None:
                raise UsageError(f"batch_size={batch_size}: the DataLoader makes the batches of a stream; leave it out")
            if data.persistent_workers:
                raise UsageError("a DataLoader over a stream needs persistent_workers=False: it may be read from anew")
            if not isinstance(data.worker_init_fn, EndsWithWorker):
                data.worker_init_fn = EndsWithWorker(data.worker_init_fn)
            units, self._samples_of_unit = ranks, data.batch_size or 1
        else:
            if batch_size is None:
                raise UsageError("batches() needs batch_size=: the number of samples per step over all ranks")
            if batch_size < ranks or batch_size % ranks:
                raise UsageError(f"batch_size={batch_size} with ranks={ranks}: must be a multiple of it")
            units, self._samples_of_unit, self._collate = batch_size, 1, default_collate
        if hasattr(data, "__next__"):
            raise UsageError(
                f"batches() of a {type(data).__name__}, which can be read once only: give a dataset that begins anew "
                "with each iter(), so that its samples are found again after a crash"
            )
        self.reading = Reading(units, _ENDLESS, _ENDLESS, counts_batches=isinstance(data, DataLoader))
        self._record = begin(self.reading)
        self._readers: list[_Reader] = []
        self._first_units: dict[int, int] = {}

    @property
    def samples(self) -> int:
        """In the batch of one rank step, as they are now."""
        return self._record.reading.batch // self._ranks * self._samples_of_unit

    def get(self, rank_step: RankStep, ranks: Sequence[int]) -> Any:
        """The batch of ``rank_step``; ``ranks`` are all ranks that this worker holds."""
        if self._record_for is not None:
            self._record = self._record_for(self.reading)
        position, share = self._record.place_of(rank_step.step, rank_step.rank, self._ranks)
        units = self._reader_before(position, len(ranks)).read(position, share)
        if self._collate is None:
            (batch,) = units
            return batch
        seed_everything(self._seed, rank_step, "data")
        return self._collate(units)

    def close(self) -> None:
        self._readers.clear()

    def _reader_before(self, position: int, ranks: int) -> _Reader:
        """The one that has the shortest way to go. Ranks at different steps need one each, none of which goes back."""
        before = [reader for reader in self._readers if reader.position <= position]
        if before:
            return max(before, key=lambda reader: reader.position)
        if len(self._readers) >= max(1, ranks):
            self._readers.remove(max(self._readers, key=lambda reader: reader.position))
        self._readers.append(_Reader(self._source, self._seed, self._first_units))
        return self._readers[-1]


class ReadingOn:
    """How far a reader is on its way to a position: said now and then, if the way is long, and at its end.

    Pure: the time is given.
    """

    def __init__(self, begin: int, end: int, now_s: float) -> None:
        self._begin = begin
        self._end = end
        self._begun_s = self._said_s = now_s

    def said(self, at: int, now_s: float) -> dict[str, str]:
        """What is to be said at a position; nothing, most times."""
        is_long = self._said_s > self._begun_s
        if now_s - self._said_s < _SAY_AFTER_S and not (is_long and at == self._end):
            return {}
        self._said_s = now_s
        took_s = max(now_s - self._begun_s, 1e-9)
        rate = (at - self._begin) / took_s
        done = {"done": f"{at:,}/{self._end:,}", "percent": f"{100 * at // self._end}", "rate": f"{rate:,.0f}/s"}
        if at == self._end:
            return {**done, "took": duration(took_s)}
        return {**done, "left": duration((self._end - at) / rate)}


class _Reader:
    """Reads the units of a stream one after the other; ``position``: that of the next one.

    ``first_units``: by pass, a digest of its first unit; all readers of the stream compare.
    """

    def __init__(self, source: Iterable[Any], seed: int, first_units: dict[int, int]) -> None:
        self.position = 0
        self._source: Any = source
        self._seed = seed
        self._first_units = first_units
        self._pass = 0
        self._at_begin = True
        self._log = logs.get_logger()
        self._counted = "batches" if isinstance(source, DataLoader) else "samples"
        self._generators: HostGenerators | None = None
        """As this reader left them."""
        self._units: Iterator[Any]
        with self._own_generators():
            self._begin_pass()

    def read(self, position: int, count: int) -> list[Any]:
        """Read on to these units."""
        progress = ReadingOn(self.position, position, time.monotonic())
        with self._own_generators():
            self._tell_pass()  # another reader of the same source may be in another
            while self.position < position:
                self._next()
                if said := progress.said(self.position, time.monotonic()):
                    self._log.info("reading on in the stream", **said, of=self._counted)
            return [self._next() for _ in range(count)]

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        """Inside, generators go on from where they were here; the script's own seeds come after each batch."""
        if self._generators is not None:
            self._generators.restore()
        yield
        self._generators = HostGenerators.now()

    def _next(self) -> Any:
        for _ in range(2):
            try:
                unit = next(self._units)
            except StopIteration:
                self._pass += 1
                self._begin_pass()
                continue
            self.position += 1
            if self._at_begin:
                self._at_begin = False
                self._compare(unit)
            return unit
        raise UsageError(f"batches(): the stream of {type(self._source).__name__} is empty in pass {self._pass}")

    def _compare(self, unit: Any) -> None:
        digest = _digest(unit)
        if self._first_units.setdefault(self._pass, digest) != digest:
            raise UsageError(
                f"batches(): pass {self._pass} of {type(self._source).__name__} begins with something else than "
                "when it was read before, so its samples cannot be found again: let it depend on the pass, "
                "and on the global generators of random numbers, only"
            )

    def _begin_pass(self) -> None:
        self._at_begin = True
        seed_all(stream_seed(self._seed, self._pass, 0, "stream"))
        self._tell_pass()
        self._units = iter(self._source)

    def _tell_pass(self) -> None:
        for source in (self._source, getattr(self._source, "dataset", None)):
            told = getattr(source, "set_epoch", None)
            if told is not None:
                told(self._pass)


def _digest(unit: Any) -> int:
    """Of the numbers and texts in one unit; what else is in it counts by its type only."""
    digest = xxh3_64()
    for leaf in tree_leaves(unit):
        if isinstance(leaf, torch.Tensor):
            digest.update(as_bytes(leaf.detach().cpu().contiguous().view(-1)))
        elif isinstance(leaf, np.ndarray):
            digest.update(leaf.tobytes())
        else:
            digest.update(repr(leaf if isinstance(leaf, int | float | str | bytes) else type(leaf)).encode())
    return digest.intdigest()
