"""A DataLoader's sampler is honoured, as a pure function of seed and data epoch, or refused by name."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from psa_store.errors import UsageError
from psa_store.worker.batches import Batches, RankStep

N = 100
RANKS = 2


def seen(loader: DataLoader[Any], steps: int, *, seed: int = 1, first: int = 0, **options: Any) -> list[list[int]]:
    """By step, the samples of all ranks, in the order of ranks."""
    batches = Batches(loader, options.get("batch_size"), seed=seed, ranks=RANKS)
    return [
        [each for rank in range(RANKS) for each in batches.get(RankStep(step, rank), (rank,)).tolist()]
        for step in range(first, first + steps)
    ]


def flat(steps: list[list[int]]) -> list[int]:
    return list(itertools.chain(*steps))


def load(**options: Any) -> DataLoader[Any]:
    return DataLoader(range(N), **{"batch_size": 5, **options})  # type: ignore[arg-type]


class Epoch(Sampler[int]):
    """As many users write: another order in each epoch, if it is told which it is."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter([(each + 7 * self.epoch) % N for each in range(N)])


class ByAnyMeans(Sampler[int]):
    """Draws from every generator that there is."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        yield random.randrange(N)
        yield int(np.random.randint(N))
        yield int(torch.randint(N, ()))


def test_without_shuffle_the_order_is_that_of_the_data_set() -> None:
    assert flat(seen(load(), 25)) == [*range(N), *range(N), *range(50)]


def test_with_shuffle_every_epoch_has_every_sample_in_another_order() -> None:
    order = flat(seen(load(shuffle=True), 20))
    assert sorted(order[:N]) == sorted(order[N:]) == list(range(N)) and order[:N] != order[N:]
    plain = Batches(range(N), 10, seed=1, ranks=RANKS)
    assert order[:5] == plain.get(RankStep(0, 0), (0,)).tolist(), "the order of a data set without a loader"


def test_a_subset_stays_a_subset() -> None:
    order = flat(seen(load(sampler=SubsetRandomSampler(range(80))), 16))
    assert sorted(order[:80]) == sorted(order[80:]) == list(range(80)) and order[:80] != order[80:]


def test_weights_are_honoured() -> None:
    order = flat(seen(load(sampler=WeightedRandomSampler([0.0] * 90 + [1.0] * 10, N)), 30))
    assert set(order) == set(range(90, N)) and order[:N] != order[N : 2 * N]


def test_a_sampler_with_a_generator_of_its_own_is_seeded_by_the_job() -> None:
    loader = load(sampler=RandomSampler(range(N), replacement=True, generator=torch.Generator().manual_seed(99)))
    assert seen(loader, 20) == seen(loader, 20)
    assert seen(loader, 20) != seen(loader, 20, seed=2)


@pytest.mark.parametrize("sampler", [ByAnyMeans(), Epoch()], ids=["three generators", "set_epoch"])
def test_a_later_step_is_found_without_those_before(sampler: Sampler[int]) -> None:
    whole = seen(load(sampler=sampler, batch_size=1), 300)
    for first in (0, 1, 149, 250):
        torch.manual_seed(first)
        assert seen(load(sampler=sampler, batch_size=1), 5, first=first) == whole[first : first + 5]


def test_each_epoch_is_told_to_a_sampler_that_wants_to_know() -> None:
    order = flat(seen(load(sampler=Epoch()), 20))
    assert order[0] == 0 and order[N] == 7


@pytest.mark.parametrize("shuffle", [False, True])
def test_drop_last_leaves_out_the_rest_of_an_epoch(shuffle: bool) -> None:
    order = seen(load(batch_size=15, shuffle=shuffle, drop_last=True), 6)
    for epoch in (order[:3], order[3:]):
        assert len(set(flat(epoch))) == 90
    if not shuffle:
        assert order[3][0] == 0


def test_without_drop_last_a_step_may_span_two_epochs() -> None:
    order = seen(load(batch_size=15), 4)
    assert order[3] == [*range(90, N), *range(20)]


def test_batches_of_a_batch_sampler_go_to_one_rank_each() -> None:
    batches = BatchSampler(SequentialSampler(range(N)), 4, drop_last=False)
    loader = DataLoader(range(N), batch_sampler=batches)  # type: ignore[arg-type]
    assert seen(loader, 2) == [list(range(8)), list(range(8, 16))]
    shuffled = DataLoader(range(N), batch_sampler=BatchSampler(RandomSampler(range(N)), 4, drop_last=True))  # type: ignore[arg-type]
    order = flat(seen(shuffled, 25))
    assert sorted(order[:N]) == sorted(order[N:]) == list(range(N)) and order[:N] != order[N:]


def test_processes_of_the_loader_see_the_same_order() -> None:
    alone, helped = load(sampler=ByAnyMeans(), batch_size=1), load(sampler=ByAnyMeans(), batch_size=1, num_workers=1)
    batches = Batches(helped, None, seed=1, ranks=1)
    expected = Batches(alone, None, seed=1, ranks=1)
    try:
        for step in range(9):
            assert batches.get(RankStep(step, 0), (0,)).tolist() == expected.get(RankStep(step, 0), (0,)).tolist()
    finally:
        batches.close()


class Counts(Sampler[int]):
    """Goes on where it stopped: no step of it can be found again."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        self.at += 10
        return iter([each % N for each in range(self.at, self.at + 10)])


class Grows(Epoch):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10 + self.epoch))


def test_what_cannot_be_found_again_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="Counts gives another order"):
        seen(load(sampler=Counts()), 1)
    with pytest.raises(UsageError, match="Grows gives 11 in data epoch 1, and 10 in the first"):
        seen(load(sampler=Grows(), batch_size=1), 6)
    with pytest.raises(UsageError, match=r"DistributedSampler.*shuffle=True"):
        seen(load(sampler=DistributedSampler(range(N), num_replicas=2, rank=0)), 1)  # type: ignore[arg-type, var-annotated]
    with pytest.raises(UsageError, match="SubsetRandomSampler gives no samples"):
        seen(load(sampler=SubsetRandomSampler([])), 1)
    with pytest.raises(UsageError, match="drop_last=True: 100 samples make no batch of 120"):
        seen(load(batch_size=60, drop_last=True), 1)
    with pytest.raises(UsageError, match="batch_size=8: the DataLoader has a batch_sampler"):
        batches = BatchSampler(SequentialSampler(range(N)), 4, drop_last=False)
        seen(DataLoader(range(N), batch_sampler=batches), 1, batch_size=8)  # type: ignore[arg-type]
