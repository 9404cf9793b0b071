"""A rank's batch in equal parts: whatever holds its tensors, and an error that says what to do where it has none."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from psa_store.errors import UsageError
from psa_store.worker.microbatches import microbatches_of

X = torch.arange(12.0).view(6, 2)
Y = torch.arange(6)


class Batch(NamedTuple):
    x: Tensor
    rest: Any


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))
def test_parts_are_equal_and_give_the_batch_again(count: int, size: int, more_dimensions: int) -> None:
    batch = torch.randn(count * size, *(2,) * more_dimensions)
    parts = microbatches_of(batch, count)
    assert [len(part) for part in parts] == [size] * count
    assert torch.equal(torch.cat(parts), batch)


@pytest.mark.parametrize("kind", [tuple, list])
def test_all_tensors_of_a_sequence_are_cut_alike(kind: type) -> None:
    parts = microbatches_of(kind([X, Y]), 3)
    assert all(type(part) is kind for part in parts)
    for index, (x, y) in enumerate(parts):
        low = 2 * index
        assert torch.equal(x, X[low : low + 2]) and torch.equal(y, Y[low : low + 2])


def test_a_named_tuple_stays_one() -> None:
    for index, part in enumerate(microbatches_of(Batch(X, Y), 2)):
        assert type(part) is Batch and torch.equal(part.x, X[3 * index : 3 * index + 3])
        assert torch.equal(part.rest, Y[3 * index : 3 * index + 3])


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_of_any_kind_gives_its_names(kind: Any) -> None:
    """Such as the batches of a tokenizer."""
    for index, part in enumerate(microbatches_of(kind({"x": X, "y": Y}), 3)):
        assert list(part) == ["x", "y"] and torch.equal(part["y"], Y[2 * index : 2 * index + 2])


def test_what_is_inside_of_others_is_cut_too_and_what_is_no_tensor_goes_to_each() -> None:
    first, second = microbatches_of({"x": [X, (Y, "text")], "scale": 0.5, "none": None}, 2)
    for part, low in ((first, 0), (second, 3)):
        x, (y, text) = part["x"]
        assert torch.equal(x, X[low : low + 3]) and torch.equal(y, Y[low : low + 3])
        assert (text, part["scale"], part["none"]) == ("text", 0.5, None)


@pytest.mark.parametrize("batch", [X, "no tensor", None, {"y": 1}, (X, torch.ones(4))])
def test_one_micro_batch_is_the_batch_as_it_is(batch: Any) -> None:
    [only] = microbatches_of(batch, 1)
    assert only is batch


@pytest.mark.parametrize(
    ("batch", "count", "words"),
    [
        (X, 4, "a batch of 6 samples for a rank can not be cut into 4 micro-batches: give each rank a multiple"),
        (X[:3], 4, "a batch of 3 samples"),
        (X[:0], 2, "a batch of 0 samples"),
        (torch.tensor(1.0), 2, "a batch of 0 samples"),
        ((X, Y[:4]), 2, "a batch of 4 and 6 samples"),
        ({"x": X, "inside": [Y[:4]]}, 2, "a batch of 4 and 6 samples"),
        (Batch(X, Y), 5, "a batch of 6 samples"),
    ],
)
def test_a_batch_that_can_not_be_cut_is_refused_with_its_sizes(batch: Any, count: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        microbatches_of(batch, count)


@pytest.mark.parametrize("batch", [None, 3, "text", (), {}, [1, "a"], {"x": None}])
def test_a_batch_without_a_tensor_is_refused(batch: Any) -> None:
    with pytest.raises(UsageError, match="a batch without a tensor can not be cut into 2 micro-batches: give tensors"):
        microbatches_of(batch, 2)
