"""Where a job is in its data, counted in samples: what each step reads, also after the batch size has changed.

A job walks through its data in *stretches*: from some step on, all steps take as many samples, of passes that are as
long. The stretches are one document of the job, so that every process finds the samples of a step again, whatever its
script says by now.

Pure: no I/O, no threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from psa_store.errors import JobMismatch, UsageError
from psa_store.job.change import Change
from psa_store.job.document import ADDED_LATER


@dataclass(frozen=True, slots=True)
class Reading:
    """How a script reads its data. Where its sampler makes batches, these are counted, and not samples."""

    batch: int
    """Samples that all ranks together take in a step."""
    length: int
    """Samples of one pass over the data."""
    samples: int
    """Of the data set: a sampler may give fewer of them in a pass, or more."""
    whole_steps: bool = False
    """Whether samples at the end of a pass are left out that make no whole step (``drop_last``)."""
    counts_batches: bool = field(default=False, compare=False)
    """Whether these are batches, of which each rank takes one: then ``batch`` can not be another."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps from ``step`` on. ``position``: where the samples before it end, counted over all passes."""

    step: int
    position: int
    reading: Reading

    def position_of(self, step: int) -> int:
        """The position of the first sample of a step."""
        steps, reading = step - self.step, self.reading
        if not reading.whole_steps:
            return self.position + steps * reading.batch
        passes, within = divmod(self.position, reading.length)
        in_this_pass = (reading.length - within) // reading.batch
        if steps < in_this_pass:
            return self.position + steps * reading.batch
        more, steps = divmod(steps - in_this_pass, reading.length // reading.batch)
        return (passes + 1 + more) * reading.length + steps * reading.batch

    def end_before(self, step: int) -> int:
        """Where the samples of the step before end; a step of another size may find room in the rest of that pass."""
        return self.position if step == self.step else self.position_of(step - 1) + self.reading.batch


@dataclass(frozen=True, slots=True)
class DataRecord:
    """The stretches of a job, ascending, and the workers that know the last one: all others are refused."""

    FORMAT: ClassVar[int] = 1

    stretches: tuple[Stretch, ...]
    readers: tuple[str, ...] = ()
    changes: int = field(default=0, metadata=ADDED_LATER)
    """How many changes of the job are in it."""
    said: int | None = field(default=None, metadata=ADDED_LATER)
    """Where the batch size was set by such a change: what scripts said before, and may go on saying."""

    @property
    def reading(self) -> Reading:
        """The newest one."""
        return self.stretches[-1].reading

    def stretch_at(self, step: int) -> Stretch:
        """The stretch of a step."""
        return next(each for each in reversed(self.stretches) if each.step <= step)

    def place_of(self, step: int, rank: int, ranks: int) -> tuple[int, int]:
        """Where the samples of a rank begin in a step, and how many they are.

        Raises:
            UsageError: the step was made with a number that so many ranks cannot share.
        """
        stretch = self.stretch_at(step)
        share, left = divmod(stretch.reading.batch, ranks)
        if left:
            raise UsageError(
                f"step {step} was made with {stretch.reading.batch} samples, which {ranks} ranks cannot share: go back "
                "to a version with which this number of ranks began"
            )
        return stretch.position_of(step) + rank * share, share

    def known_to(self, readers: Iterable[str]) -> DataRecord:
        """The same, for these workers."""
        return replace(self, readers=tuple(sorted(set(readers))))

    def changed(self, reading: Reading, step: int) -> DataRecord:
        """Read like this from ``step`` on; what was to come after it is dropped.

        Another batch size goes on with the sample that is next, another data set with a new pass.
        """
        former = self.stretch_at(step)
        position = former.end_before(step)
        if _data(reading) != _data(former.reading):
            position = -(-position // former.reading.length) * reading.length
        kept = [each for each in self.stretches if each.step < step]
        if not kept or kept[-1].reading != reading:
            kept.append(Stretch(step, position, reading))
        return replace(self, stretches=tuple(kept))

    def following(self, changes: Sequence[Change]) -> DataRecord:
        """The same, with the changes of the job that are not in it yet. Every process comes to the same."""
        if len(changes) <= self.changes:
            return self
        record = self
        for change in changes[self.changes :]:
            size = change.numbers.batch_size
            if size is not None:
                said = record.reading.batch if record.said is None else record.said
                record = replace(record.changed(replace(record.reading, batch=size), change.step), said=said)
        return replace(record, changes=len(changes))

    def as_set(self, job: str, reading: Reading) -> Reading:
        """How a script reads that is written like ``reading``: with the batch size that was set, if one was.

        Raises:
            JobMismatch: it says another one than that, and than what scripts said before.
        """
        size = self.reading.batch
        if self.said is None or reading.batch == size:
            return reading
        if reading.batch != self.said:
            raise JobMismatch(
                f"job {job!r} was told to train with batch_size={size} from step {self.stretches[-1].step} on, this "
                f"process has batch_size={reading.batch}. `psa job set {job} batch_size={reading.batch}` changes it "
                f"from now on. Else say {size}, or {self.said}, as before"
            )
        return replace(reading, batch=size)

    def check_batch_size(self, job: str, ranks: int, size: int) -> None:
        """Raise UsageError if steps can not have so many samples."""
        if self.reading.counts_batches:
            raise UsageError(
                f"batch_size={size}: in job {job!r} the script's DataLoader makes the batches (a batch_sampler, or "
                "a stream's), and each rank takes one: change it in the script, the job goes on with the next batch"
            )
        if size % ranks:
            raise UsageError(
                f"batch_size={size} counts the samples of all ranks together and must be divisible by ranks={ranks}: "
                f"use {max(1, round(size / ranks)) * ranks}"
            )
        if self.reading.whole_steps and size > self.reading.length:
            raise UsageError(
                f"batch_size={size}: with drop_last=True, {self.reading.length} samples make no batch of it"
            )

    def check_data(self, job: str, reading: Reading) -> None:
        """Refuse another data set than that of the newest stretch.

        Raises:
            JobMismatch: it names what differs, and says how to go on.
        """
        stored = self.reading
        if reading.samples != stored.samples:
            what, theirs, ours = "samples", stored.samples, reading.samples
        elif reading.length != stored.length:
            what, theirs, ours = "samples a pass, as its sampler gives them", stored.length, reading.length
        else:
            return
        raise JobMismatch(
            f"job {job!r} exists with a data set of {theirs} {what}, this process has {ours}. Use the same, or, if "
            "the change is meant, worker.batches(…, changed_data=True): a new pass begins with it"
        )


def begin(reading: Reading) -> DataRecord:
    """The record of a job that reads like this from its first step on."""
    return DataRecord((Stretch(0, 0, reading),))


def _data(reading: Reading) -> tuple[int, int]:
    return reading.samples, reading.length
