"""What one stage hands to the next: the same tensors come out, however they travel, and garbage is refused."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from psa_store.errors import Refused, UsageError
from psa_store.worker.carry import CarryPool, Parcel, as_it_travels, by_value, of_stage, read

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool]
SHAPES = [(), (0,), (3, 0), (1,), (7,), (2, 3), (64,), (5, 1, 33)]


@st.composite
def parcels(draw: st.DrawFn) -> Parcel:
    tensors: list[Tensor | None] = []
    for seed in range(draw(st.integers(0, 5))):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
        generator = torch.Generator().manual_seed(seed)
        numbers = (torch.randn(shape, generator=generator) * 100).to(dtype)
        tensors.append(draw(st.sampled_from([numbers, numbers.T if numbers.dim() == 2 else numbers, None])))
    wants = tuple(draw(st.booleans()) for _ in tensors)
    return Parcel(tuple(tensors), wants, draw(st.booleans()), draw(st.none() | st.floats(0, 1e9)))


def sent_by_value(parcel: Parcel) -> Parcel:
    return read(memoryview(bytearray(by_value(parcel))), None)


def sent_in_memory(parcel: Parcel) -> Parcel:
    memory = CarryPool().write(parcel)
    return read(memoryview(bytearray(parcel.describe())), os.dup(memory.fd))


def assert_equal(found: Parcel, expected: Parcel) -> None:
    said = found.wants_gradient, found.single, found.weight
    assert said == (expected.wants_gradient, expected.single, expected.weight)
    assert len(found.tensors) == len(expected.tensors)
    for mine, theirs in zip(found.tensors, expected.tensors, strict=True):
        if mine is None or theirs is None:
            assert mine is theirs
            continue
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous() and mine.data_ptr() % 64 == 0, "kernels give the same last bits everywhere"


@given(parcels())
def test_what_travels_by_value_comes_out_as_it_was(parcel: Parcel) -> None:
    assert_equal(sent_by_value(parcel), parcel)


@given(parcels())
def test_what_travels_in_memory_comes_out_as_it_was_and_leaves_no_descriptor(parcel: Parcel) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert_equal(sent_in_memory(parcel), parcel)
    assert len(os.listdir("/proc/self/fd")) == before


@given(parcels())
def test_both_ways_have_the_same_bytes_in_the_same_order(parcel: Parcel) -> None:
    """A relay compares what comes in one way with what came in the other."""
    whole = bytes(by_value(parcel))
    assert len(whole) == len(parcel.describe()) + parcel.size_bytes
    assert whole == (parcel.describe() + bytes(CarryPool().write(parcel).buffer))[: len(whole)]


def test_numbers_that_are_none_come_out_bit_by_bit() -> None:
    odd = torch.tensor([0x7FC00001, 0x7F800000, 0x80000000 - (1 << 32), 1], dtype=torch.int32).view(torch.float32)
    for send in (sent_by_value, sent_in_memory):
        [found] = send(Parcel((odd,), (True,))).tensors
        assert found is not None and torch.equal(found.view(torch.int32), odd.view(torch.int32))


def test_what_comes_out_may_be_written_to() -> None:
    """A stage may change what it gets in place; the relay's memory, and other readers', stay as they are."""
    memory = CarryPool().write(parcel := Parcel((torch.ones(4),), (False,)))
    for _ in range(2):
        [found] = read(memoryview(bytearray(parcel.describe())), os.dup(memory.fd)).tensors
        assert found is not None and found.tolist() == [1.0] * 4
        found.zero_()


# --- what a stage returned


def test_a_tensor_and_a_tuple_of_one_are_told_apart() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert of_stage(tensor, 0).single and not of_stage((tensor,), 0).single and not of_stage([tensor], 0).single


def test_what_wants_gradients_is_told_and_nothing_keeps_the_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    parcel = of_stage((x * 2, torch.arange(3)), 0)
    assert parcel.wants_gradient == (True, False)
    assert all(tensor is not None and tensor.grad_fn is None for tensor in parcel.tensors)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).T,
        torch.arange(12.0)[1:],
        torch.arange(12.0)[::2],
        torch.ones(1).expand(5),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    ],
    ids=["transposed", "from the middle", "every second", "expanded", "channels last"],
)
def test_a_tensor_lies_for_a_stage_here_as_for_one_elsewhere(tensor: Tensor) -> None:
    """Or the last bits of what the next stage makes of it would tell which worker holds that."""
    [here] = of_stage(tensor, 0).tensors
    [elsewhere] = sent_by_value(of_stage(tensor, 0)).tensors
    assert here is not None and elsewhere is not None
    assert torch.equal(here, tensor) and torch.equal(elsewhere, tensor)
    assert here.stride() == elsewhere.stride()
    assert here.data_ptr() % 64 == elsewhere.data_ptr() % 64 == 0


def test_a_tensor_that_lies_well_is_not_copied() -> None:
    tensor = torch.ones(100)
    assert as_it_travels(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "stage 3 returned a NoneType"),
        (1.0, "stage 3 returned a float"),
        ({"x": torch.ones(1)}, "stage 3 returned a dict with a dict"),
        ((torch.ones(1), None), "stage 3 returned a tuple with a NoneType"),
        ([torch.ones(1), [torch.ones(1)]], "stage 3 returned a list with a list"),
        ((), "stage 3 returned nothing"),
        ([], "stage 3 returned nothing"),
    ],
)
def test_what_no_stage_may_return_is_refused_with_its_type(returned: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        of_stage(returned, 3)


# --- garbage


def described(*said: Any) -> bytes:
    text = json.dumps(said).encode()
    return (struct.pack("<I", len(text)) + text).ljust(256, b" ")


GARBAGE = [
    b"",
    b"\0\0",
    struct.pack("<I", 4),
    struct.pack("<I", 4) + b"\xff\xff\xff\xff",
    struct.pack("<I", 2**32 - 1) + b"[",
    struct.pack("<I", 100_000) + b"[" * 100_000,
    described(),
    described([], [], False),
    described(None, [], False, None),
    described([[]], [True], False, None),
    described([["float32"]], [True], False, None),
    described([["float32", 4]], [True], False, None),
    described([["nn", [1]]], [True], False, None),
    described([["no such dtype", [1]]], [True], False, None),
    described([[7, [1]]], [True], False, None),
    described([["float32", [-1]]], [True], False, None),
    described([["float32", [-1, -64]]], [True], False, None),
    described([["float32", ["a"]]], [True], False, None),
    described([["float32", [10_000]]], [True], False, None),
    described([["float32", [2**62, 4]]], [True], False, None),
    described([["float32", [10**40]]], [True], False, None),
    described([["float32", [1]]], [], False, None),
    described([["float32", [1]]], 5, False, None),
    described([], [True], False, None),
    described([], [], False, "heavy"),
]


@pytest.mark.parametrize("payload", GARBAGE)
def test_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(Refused):
        read(memoryview(bytearray(payload)), None)


@pytest.mark.parametrize("payload", GARBAGE)
def test_garbage_with_memory_is_refused_and_the_memory_closed(payload: bytes) -> None:
    memory = CarryPool().write(Parcel((), ()))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Refused):
        read(memoryview(bytearray(payload)), os.dup(memory.fd))
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.binary(max_size=300))
def test_whatever_comes_is_a_parcel_or_refused(payload: bytes) -> None:
    for given_bytes in (payload, struct.pack("<I", len(payload)) + payload):
        try:
            read(memoryview(bytearray(given_bytes)), None)
        except Refused:
            pass
