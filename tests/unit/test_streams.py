"""Streams: each unit is given once, to one rank, whichever process reads it and wherever it begins."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from psa_store.errors import UsageError
from psa_store.job.position import begin
from psa_store.logs import configure, setup
from psa_store.worker import streams
from psa_store.worker.batches import RankStep
from psa_store.worker.streams import ReadingOn, StreamBatches, is_stream

LENGTH = 23


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(LENGTH))


class Shuffled(IterableDataset[int]):
    """In an order that global generators give; in the way of a dataset that is told of each pass."""

    told = -1

    def set_epoch(self, number: int) -> None:
        self.told = number

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(LENGTH).tolist()
        for index in order:
            yield 1000 * self.told + index + (random.random() < 0)


class Shared(IterableDataset[int]):
    """Each process of a DataLoader takes its part, as torch's documentation has it."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(LENGTH) if info is None else range(info.id, LENGTH, info.num_workers))


class Tensors(IterableDataset[dict[str, torch.Tensor]]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({"x": torch.full((2, 2), float(i)), "y": torch.tensor(i)} for i in range(LENGTH))


class Unsteady(IterableDataset[int]):
    reads = 0

    def __iter__(self) -> Iterator[int]:
        self.reads += 1
        return iter(range(self.reads, LENGTH))


def made(data: object, size: int | None = 6, ranks: int = 2) -> StreamBatches:
    return StreamBatches(data, size, seed=3, ranks=ranks)


def taken(batches: StreamBatches, steps: range, ranks: range = range(2)) -> list[int]:
    return [int(each) for step in steps for rank in ranks for each in batches.get(RankStep(step, rank), ranks)]


def test_what_counts_as_a_stream() -> None:
    assert is_stream(Numbers()) and is_stream(DataLoader(Numbers())) and is_stream(iter([1]))
    assert not is_stream([1, 2]) and not is_stream(DataLoader([1, 2]))  # type: ignore[arg-type]


def test_units_are_shared_out_in_their_order_and_passes_follow_each_other() -> None:
    assert taken(made(Numbers()), range(8)) == [i % LENGTH for i in range(48)]


@pytest.mark.parametrize("data", [Numbers, Shuffled])
def test_each_unit_of_a_pass_comes_once(data: type[IterableDataset[int]]) -> None:
    seen = taken(made(data()), range(LENGTH))  # six passes
    for number in range(6):
        assert len(set(seen[number * LENGTH : (number + 1) * LENGTH])) == LENGTH


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1)), min_size=1, max_size=30), st.booleans())
def test_a_batch_is_the_same_wherever_the_reader_stands(asked: list[tuple[int, int]], shuffled: bool) -> None:
    data: IterableDataset[int] = Shuffled() if shuffled else Numbers()
    whole = taken(made(data), range(21))
    batches = made(Shuffled() if shuffled else Numbers())
    for step, rank in asked:
        torch.rand(7), random.random()  # the script draws in between
        low = step * 6 + rank * 3
        assert [int(each) for each in batches.get(RankStep(step, rank), range(2))] == whole[low : low + 3]


def test_ranks_that_are_at_different_steps_read_each_for_itself() -> None:
    """As in rounds: not from the beginning for each of them."""
    batches, reads = made(Numbers()), itertools.count()
    begun = []

    class Counted(Numbers):
        def __iter__(self) -> Iterator[int]:
            begun.append(next(reads))
            return super().__iter__()

    batches = made(Counted())
    for low in range(0, 3 * LENGTH, 4):
        for rank in range(2):
            for step in range(low, low + 4):
                batches.get(RankStep(step, rank), range(2))
    assert len(begun) <= 2 * (3 * LENGTH * 6 // LENGTH + 2)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_loader_makes_the_batches(processes: int) -> None:
    loader = DataLoader(Shared(), batch_size=4, num_workers=processes)
    expected = [batch.tolist() for batch in loader]
    batches = made(loader, None)
    ours = [batches.get(RankStep(step, rank), range(2)).tolist() for step in range(3) for rank in range(2)]
    assert ours == expected[:6]
    assert batches.samples == 4
    batches.close()


def test_the_position_counts_samples() -> None:
    """A job whose batches have changed goes on with the next sample."""
    batches = StreamBatches(Numbers(), 8, seed=0, ranks=2, record_for=lambda reading: record)
    record = begin(made(Numbers(), 4).reading).changed(batches.reading, 2)
    assert taken(batches, range(4)) == [*list(range(24 - 1)), 0]


def test_what_can_not_be_repeated_is_refused() -> None:
    with pytest.raises(UsageError, match="once only"):
        made(iter(range(5)))
    batches = made(Tensors())
    assert batches.get(RankStep(5, 0), range(2))["y"].tolist() == [7, 8, 9]
    assert batches.get(RankStep(1, 0), range(2))["x"].shape == (3, 2, 2)
    batches = made(Unsteady())
    taken(batches, range(3))
    with pytest.raises(UsageError, match="begins with something else"):
        taken(batches, range(1))


@pytest.mark.parametrize(
    ("data", "size", "words"),
    [
        (Numbers(), None, "batch_size="),
        (Numbers(), 5, "multiple"),
        (DataLoader(Numbers(), 2), 4, "the DataLoader makes the batches"),
        (DataLoader(Numbers(), 2, num_workers=1, persistent_workers=True), None, "persistent_workers"),
    ],
)
def test_what_can_not_be_shared_out_is_refused(data: object, size: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        made(data, size)


def test_an_empty_stream_is_refused() -> None:
    class Empty(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    with pytest.raises(UsageError, match="is empty"):
        taken(made(Empty()), range(1))


def test_a_reader_that_has_far_to_go_says_how_far_it_is() -> None:
    way = ReadingOn(1000, 41_000, now_s=100.0)
    assert way.said(2000, 104.9) == {}
    assert way.said(11_000, 105.0) == {"done": "11,000/41,000", "percent": "26", "rate": "2,000/s", "left": "15.0 s"}
    assert way.said(13_000, 106.0) == {}
    assert way.said(31_000, 110.0) == {"done": "31,000/41,000", "percent": "75", "rate": "3,000/s", "left": "3.3 s"}
    assert way.said(41_000, 113.0) == {"done": "41,000/41,000", "percent": "100", "rate": "3,077/s", "took": "13.0 s"}
    assert ReadingOn(0, 7, now_s=100.0).said(7, 101.0) == {}, "a short way needs no words"


def test_what_is_said_comes_on_the_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With one reader, as in a process that begins where the job is at step 3."""
    monkeypatch.setattr(streams, "_SAY_AFTER_S", 0.0)
    monkeypatch.setattr(setup, "_setup", None)  # other tests find the log as it was
    configure("info", "worker")
    StreamBatches(Numbers(), 6, seed=0, ranks=2).get(RankStep(3, 0), (0,))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 18 and all("reading on in the stream" in line and "of=samples" in line for line in said)
    assert "done=1/18" in said[0] and "percent=5" in said[0] and "left=" in said[0]
    assert "done=18/18" in said[-1] and "percent=100" in said[-1] and "took=" in said[-1]
