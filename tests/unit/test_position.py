"""Where a job is in its data: counted in samples, whatever its batch size was and is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from psa_store.consistency import Arrivals, SyncStep
from psa_store.errors import JobMismatch, UsageError
from psa_store.job.change import Change, Numbers
from psa_store.job.document import from_text, to_text
from psa_store.job.position import DataRecord, Reading, Stretch, begin
from psa_store.worker.batches import Batches, RankStep
from psa_store.worker.streams import StreamBatches

RANKS = 2


def walk(record: DataRecord, steps: int) -> list[tuple[int, int]]:
    """Position and samples of each step."""
    return [(record.stretch_at(s).position_of(s), record.stretch_at(s).reading.batch) for s in range(steps)]


@given(
    changes=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=6),
    length=st.integers(9, 60),
    whole=st.booleans(),
)
def test_each_step_goes_on_where_the_one_before_ended(changes: list[tuple[int, int]], length: int, whole: bool) -> None:
    """And with whole steps a step lies in one pass, and a pass ends only where no further step fits."""
    record = begin(Reading(4, length, length, whole))
    for step, batch in changes:
        record = record.changed(Reading(batch, length, length, whole), step)
    expected = 0
    for position, batch in walk(record, 60):
        if whole and expected % length + batch > length:
            expected += length - expected % length
        assert position == expected
        expected += batch


def test_a_change_drops_what_was_to_come_and_keeps_what_was() -> None:
    record = begin(Reading(8, 160, 160)).changed(Reading(16, 160, 160), 10)
    assert [each.step for each in record.stretches] == [0, 10]
    assert record.stretch_at(9).reading.batch == 8 and record.stretch_at(10) == Stretch(10, 80, Reading(16, 160, 160))
    back = record.changed(Reading(8, 160, 160), 5)
    assert back == begin(Reading(8, 160, 160)), "a job that has gone back to before the change"
    assert record.changed(Reading(4, 160, 160), 10).stretches[1:] == (Stretch(10, 80, Reading(4, 160, 160)),)


def test_another_data_set_begins_a_new_pass_and_is_announced() -> None:
    record = begin(Reading(8, 160, 160))
    record.check_data("job", Reading(16, 160, 160))
    with pytest.raises(JobMismatch, match=r"data set of 160 samples, this process has 200\. .*changed_data=True"):
        record.check_data("job", Reading(8, 200, 200))
    with pytest.raises(JobMismatch, match=r"160 samples a pass, as its sampler gives them, this process has 90"):
        record.check_data("job", Reading(8, 90, 160))
    larger = Reading(8, 200, 200)
    assert record.changed(larger, 10).stretches[-1].position == 200
    assert record.changed(larger, 20).stretches[-1].position == 200, "a pass had just ended"
    assert record.changed(larger, 21).stretches[-1].position == 400


SIZE_16, RATE, SIZE_4 = (
    Change(step, numbers)
    for step, numbers in ((10, Numbers(batch_size=16)), (12, Numbers(lr=0.1)), (20, Numbers(batch_size=4, steps=30)))
)


def test_a_batch_size_that_was_set_counts_from_its_step_on() -> None:
    """Each process notes the changes that are missing, in any order of coming, and comes to the same."""
    record = begin(Reading(8, 160, 160))
    assert record.following(()) is record
    first = record.following((SIZE_16, RATE))
    assert [(each.step, each.position, each.reading.batch) for each in first.stretches] == [(0, 0, 8), (10, 80, 16)]
    both = record.following((SIZE_16, RATE, SIZE_4))
    assert both == first.following((SIZE_16, RATE, SIZE_4)) == both.following((SIZE_16, RATE, SIZE_4))
    assert both.following((SIZE_16,)) is both, "of a process that does not know the newest yet"
    assert both.stretches[-1] == Stretch(20, 240, Reading(4, 160, 160))
    assert from_text(DataRecord, to_text(both), "it") == both


def test_a_script_may_say_the_batch_size_that_was_or_that_was_set() -> None:
    record = begin(Reading(8, 160, 160)).following((SIZE_16, SIZE_4))
    for batch in (8, 4):
        assert record.as_set("job", Reading(batch, 160, 160)) == Reading(4, 160, 160)
    for batch in (16, 32):
        with pytest.raises(
            JobMismatch, match=rf"batch_size=4 from step 20 on.*={batch}\. `psa job set job batch_size="
        ):
            record.as_set("job", Reading(batch, 160, 160))
    plain = begin(Reading(8, 160, 160)).following((RATE,))
    assert plain.as_set("job", Reading(32, 160, 160)).batch == 32, "where none was set it is the script's matter"


def test_what_steps_can_not_have_is_refused() -> None:
    begin(Reading(8, 160, 160)).check_batch_size("job", 2, 500)
    with pytest.raises(UsageError, match=r"batch_size=13 counts the samples of all ranks .* ranks=4: use 12"):
        begin(Reading(8, 160, 160)).check_batch_size("job", 4, 13)
    with pytest.raises(UsageError, match=r"batch_size=162: with drop_last=True, 160 samples make no batch of it"):
        begin(Reading(8, 160, 160, whole_steps=True)).check_batch_size("job", 2, 162)
    loader = DataLoader(
        range(40),  # type: ignore[arg-type]
        batch_sampler=BatchSampler(SequentialSampler(range(40)), 5, drop_last=False),
    )
    made = Batches(loader, None, seed=0, ranks=RANKS).reading
    stream = StreamBatches(DataLoader(Endless(), 2), None, seed=0, ranks=RANKS).reading
    for reading in (made, stream):
        with pytest.raises(UsageError, match=r"the script's DataLoader makes the batches"):
            begin(reading).check_batch_size("job", 2, 8)
    begin(StreamBatches(Endless(), 4, seed=0, ranks=RANKS).reading).check_batch_size("job", 2, 8)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return count()


def test_the_record_is_a_document() -> None:
    record = begin(Reading(8, 160, 160)).changed(Reading(16, 160, 160, True), 10).known_to({"b", "a"})
    assert from_text(DataRecord, to_text(record), "it") == record and record.readers == ("a", "b")


@pytest.mark.parametrize("processes", [0, 1])
def test_batches_follow_the_record(processes: int) -> None:
    record = begin(Reading(8, 40, 40))
    loader = DataLoader(range(40), 8, num_workers=processes)  # type: ignore[arg-type]
    batches = Batches(loader, None, seed=0, ranks=RANKS, record_for=lambda _: record)

    def samples(step: int) -> list[int]:
        return [each for rank in range(RANKS) for each in batches.get(RankStep(step, rank), (0, 1)).tolist()]

    assert samples(1) == [*range(8, 16)]
    record = record.changed(Reading(16, 40, 40), 3)
    assert [samples(step) for step in range(2, 5)] == [
        [*range(16, 24)],
        [*range(24, 40)],
        [*range(16)],
    ]
    record = record.changed(Reading(15, 40, 40), 5)
    with pytest.raises(UsageError, match="step 5 was made with 15 samples, which 2 ranks cannot share"):
        samples(5)
    batches.close()


def test_where_a_sampler_makes_batches_these_are_counted() -> None:
    loader = DataLoader(
        range(40),  # type: ignore[arg-type]
        batch_sampler=BatchSampler(SequentialSampler(range(40)), 5, drop_last=False),
    )
    seen: list[Reading] = []

    def record_for(reading: Reading) -> DataRecord:
        seen.append(reading)
        return DataRecord((Stretch(0, 0, Reading(4, 8, 40)), Stretch(1, 4, reading)))

    batches = Batches(loader, None, seed=0, ranks=RANKS, record_for=record_for)
    assert batches.get(RankStep(1, 1), (1,)).tolist() == [*range(25, 30)]
    assert seen == [Reading(2, 8, 40)]


def test_the_first_step_of_which_nothing_has_arrived() -> None:
    step = SyncStep(version=5, ranks=2, trained=[0, 1], buffers=[], all_shards=[0, 1], needs_norms=False)
    assert step.untouched == 5
    step.accept(5, 1, 0)
    assert step.untouched == 6
    arrivals = Arrivals({0: [3, 4], 1: [3, 3]}, ahead_max=None, commit_interval=4, committed=6)
    assert arrivals.untouched == 4
    arrivals.accept(4, 0, 1)
    assert arrivals.untouched == 5
