"""The data order: a permutation per data epoch, the same for any number of ranks, and the same for ever."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.errors import UsageError
from psa_store.job.sampling import SampleOrder, permute, sample_indices, stream_seed


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@given(n=st.integers(1, 2**62), key=st.integers(), data=st.data())
def test_permute_maps_distinct_indices_of_huge_sets_to_distinct_indices(n: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=20, unique=True))
    image = permute(np.array(indices, dtype=np.int64), n, key).tolist()
    assert len(set(image)) == len(indices)
    assert all(0 <= value < n for value in image)


def test_permute_evaluates_each_point_on_its_own() -> None:
    n, key = 1000, 7
    whole = permute(np.arange(n), n, key)
    assert [int(permute(np.array([i]), n, key)[0]) for i in range(0, n, 37)] == whole[::37].tolist()


@pytest.mark.parametrize("n", [2, 3, 10, 64])
def test_every_place_is_taken_by_every_sample_about_equally_often(n: int) -> None:
    keys = 4000
    for place in (0, n // 2, n - 1):
        counts = Counter(int(permute(np.array([place]), n, key)[0]) for key in range(keys))
        chi_squared = sum((counts[i] - keys / n) ** 2 / (keys / n) for i in range(n))
        assert chi_squared < n - 1 + 6 * (2 * n) ** 0.5  # six standard deviations; the keys are fixed


@pytest.mark.parametrize("outside", [-1, 10, 2**62])
def test_an_index_outside_the_range_is_refused(outside: int) -> None:
    with pytest.raises(UsageError, match=r"range\(10\)"):
        permute(np.array([3, outside]), 10, key=1)


def test_neighbours_do_not_stay_together() -> None:
    n = 100_000
    steps = np.diff(permute(np.arange(n), n, 3))
    assert len(np.unique(steps)) > n // 3
    assert np.corrcoef(np.arange(n), permute(np.arange(n), n, 3))[0, 1] == pytest.approx(0.0, abs=0.02)


@st.composite
def _worlds(draw: st.DrawFn) -> tuple[int, int]:
    """(ranks, batch_size) that fit together."""
    ranks = draw(st.integers(1, 8))
    return ranks, ranks * draw(st.integers(1, 8))


@given(seed=st.integers(), world=_worlds(), n=st.integers(1, 200))
def test_every_data_epoch_has_every_sample_once_over_all_ranks(seed: int, world: tuple[int, int], n: int) -> None:
    ranks, batch_size = world
    seen = _global_order(seed, ranks, batch_size, n, steps=-(-3 * n // batch_size))
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(seed=st.integers(0, 9), n=st.integers(1, 500))
def test_the_global_order_does_not_depend_on_the_number_of_ranks(seed: int, n: int) -> None:
    orders = [_global_order(seed, ranks, batch_size=24, n=n, steps=5) for ranks in (1, 2, 3, 4, 8, 24)]
    assert all(order == orders[0] for order in orders)


@given(world=_worlds(), n=st.integers(1, 700), steps=st.lists(st.integers(0, 300), max_size=12))
def test_what_was_asked_before_changes_no_order(world: tuple[int, int], n: int, steps: list[int]) -> None:
    ranks, batch_size = world
    order = SampleOrder(7, ranks=ranks, batch_size=batch_size, n=n)
    for step in [*steps, *range(5)]:
        for rank in range(ranks):
            alone = sample_indices(7, step, rank, ranks=ranks, batch_size=batch_size, n=n)
            assert order.indices(step, rank) == alone


def test_data_epochs_and_seeds_have_orders_of_their_own() -> None:
    n = 1000
    orders = [sample_indices(seed, step, 0, ranks=1, batch_size=n, n=n) for seed in (1, 2) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_step_far_in_the_future_is_as_good_as_the_first() -> None:
    order = sample_indices(1, 10**15, 1, ranks=2, batch_size=2 * 50, n=50)
    assert sorted(order) == list(range(50))


def test_the_data_order_never_changes() -> None:
    """Golden values. A change here changes the data of every stored job: do not update them, fix the code."""
    first = sample_indices(1337, 0, 0, ranks=1, batch_size=12, n=1000)
    across_epochs = sample_indices(1337, 83, 0, ranks=2, batch_size=12, n=1000)
    assert " ".join(map(str, first)) == "279 491 189 943 252 206 810 563 898 841 908 143"
    assert " ".join(map(str, across_epochs)) == "85 554 239 839 481 497"
    assert permute(np.arange(7), 7, -1).tolist() == [6, 4, 0, 3, 1, 2, 5]
    assert permute(np.array([0, 2**61]), 2**62, 5).tolist() == [1505781879533445851, 2302894884804645664]
    assert stream_seed(1337, 0, 0, "dropout") == 6573768467158036115


@given(st.integers(), st.integers(0, 2**40), st.integers(0, 65535), st.text(max_size=8))
def test_stream_seeds_fit_every_generator(seed: int, step: int, rank: int, purpose: str) -> None:
    assert 0 <= stream_seed(seed, step, rank, purpose) < 2**63


def test_stream_seeds_differ_in_every_argument() -> None:
    seeds = [
        stream_seed(seed, step, rank, purpose)
        for seed in (0, 1, 11)
        for step in range(12)
        for rank in range(12)
        for purpose in ("torch", "numpy")
    ]
    assert len(set(seeds)) == len(seeds)
    ones = sum(value.bit_count() for value in seeds) / len(seeds)
    assert ones == pytest.approx(31.5, abs=1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 12, "ranks": 5}, ["batch_size=12", "ranks=5", "use 10"]),
        ({"batch_size": 2, "ranks": 5}, ["batch_size=2", "ranks=5", "use 5"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"n": 0}, ["n=0", "empty"]),
        ({"n": 2**62 + 1}, ["2**62"]),
        ({"rank": 2, "ranks": 2, "batch_size": 2}, ["rank=2", "ranks=2"]),
        ({"rank": -1}, ["rank=-1"]),
        ({"step": -1}, ["step=-1"]),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_name(arguments: dict[str, int], words: list[str]) -> None:
    valid = {"seed": 1, "step": 0, "rank": 0, "ranks": 1, "batch_size": 4, "n": 10}
    with pytest.raises(UsageError) as caught:
        sample_indices(**{**valid, **arguments})
    assert all(word in str(caught.value) for word in words)


def _global_order(seed: int, ranks: int, batch_size: int, n: int, steps: int) -> list[int]:
    return [
        index
        for step in range(steps)
        for rank in range(ranks)
        for index in sample_indices(seed, step, rank, ranks=ranks, batch_size=batch_size, n=n)
    ]
