"""Reduction and update of one shard: bits depend on ranks, never on arrival, threads or blocks."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_store import optim
from psa_store.compression import NONE, Compression, parse_compression
from psa_store.job.layout import Layout, TensorRole, TensorSpec, make_layout
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.kernels import make_scratch
from psa_store.optim.tensors import as_bytes
from psa_store.server.shard import OwnedShard
from psa_store.storage import Manifest
from psa_store.wire import SharedMemory


def make(
    dtype: str = "float32",
    numel: int = 5000,
    role: TensorRole = TensorRole.TRAINED,
    compression: Compression = NONE,
    clocks: int = 0,
) -> tuple[OwnedShard, Layout]:
    layout = make_layout([TensorSpec(("w",), (numel - 7,), dtype, role), TensorSpec(("b",), (7,), dtype, role)])
    owned = OwnedShard(
        layout.shards[0],
        layout,
        WireLayout(layout, compression),
        optim.SGD(lr=0.5),
        SharedMemory.create("test", layout.arena_bytes),
        clocks,
    )
    owned.loaded(Manifest(0, 1, "", (), {}))
    return owned, layout


def gradients(owned: OwnedShard, ranks: int, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(owned.shard.numel, generator=draw, dtype=torch.float64).to(owned.param.dtype) for _ in range(ranks)
    ]


@settings(max_examples=30)
@given(
    ranks=st.integers(1, 6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
)
def test_gradients_are_added_in_the_order_of_ranks_not_of_arrival(ranks: int, seed: int, dtype: str) -> None:
    owned, _ = make(dtype)
    parts = gradients(owned, ranks, seed)
    arrival = list(range(ranks))
    random.Random(seed).shuffle(arrival)
    for rank in arrival:
        as_bytes(owned.own_place(rank))[:] = as_bytes(parts[rank])
        owned.take_gradient(rank, owned.own_place(rank))
    wide = torch.float64 if dtype == "float64" else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total += part
    expected = (-0.5 * total.double() / ranks).to(owned.param.dtype)
    scratch = make_scratch()
    norm = owned.squared_norm(scratch)
    owned.apply(scratch, step=0, grad_scale=1.0)
    torch.testing.assert_close(owned.param, expected, rtol=1e-6 if wide is torch.float32 else 1e-14, atol=0.0)
    assert math.isclose(norm, float((total.double() / ranks).square().sum()), rel_tol=1e-5)


def test_shards_updated_by_many_threads_have_the_bits_of_one() -> None:
    def update(seed: int) -> torch.Tensor:
        torch.set_num_threads(1)
        owned, _ = make(numel=40_000)
        for rank, part in enumerate(gradients(owned, 2, seed)):
            owned.take_gradient(rank, part)
        owned.apply(make_scratch(), step=0, grad_scale=0.3)
        return owned.param

    alone = [update(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(update, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_memory_that_is_left_keeps_its_version_and_training_goes_on_in_the_other() -> None:
    owned, layout = make()
    other = SharedMemory.create("other", layout.arena_bytes)
    owned.take_gradient(0, torch.ones_like(owned.param))
    owned.apply(make_scratch(), step=0, grad_scale=1.0)
    left = owned.param
    owned.move_to(other)
    owned.take_gradient(0, torch.ones_like(owned.param))
    owned.apply(make_scratch(), step=1, grad_scale=1.0)
    assert bool((left == -0.5).all()) and bool((owned.param == -1.0).all())


def test_a_snapshot_does_not_follow_the_next_step() -> None:
    owned, _ = make()
    owned.take_snapshot()
    before = bytes(owned.snapshot()[0]["param"][1])
    owned.take_gradient(0, torch.ones_like(owned.param))
    owned.apply(make_scratch(), step=0, grad_scale=1.0)
    arrays, scalars = owned.snapshot()
    assert bytes(arrays["param"][1]) == before != bytes(as_bytes(owned.param))
    assert scalars == {"opt_step": 0} and owned.opt_step == 1


def test_the_clocks_of_a_snapshot_are_those_of_its_parameters() -> None:
    """Committed with later clocks, the pushes in between would be lost with the server."""
    owned, _ = make(clocks=2)
    owned.take_snapshot()
    owned.take_gradient(1, torch.ones_like(owned.param))
    owned.apply_one(1, make_scratch(), step=0, finite=True)
    _, scalars = owned.snapshot()
    assert owned.clocks == [0, 1] and scalars == {"opt_step": 0, "clock.0": 0, "clock.1": 0}


def test_buffers_are_taken_over() -> None:
    owned, _ = make(role=TensorRole.BUFFER)
    owned.take_gradient(0, torch.full_like(owned.param, 3.0))
    owned.apply(make_scratch(), step=0, grad_scale=1.0)
    assert bool((owned.param == 3.0).all())


def test_rounding_both_ways_changes_what_workers_see_and_nothing_that_is_kept() -> None:
    draw = torch.Generator().manual_seed(4)
    initial = torch.randn(make()[0].shard.numel, generator=draw)
    owned_shards = [make(compression=parse_compression(text))[0] for text in ("none", "bf16:both")]
    for owned in owned_shards:
        owned.param.copy_(initial)
        owned.loaded(Manifest(0, 1, "", (), {}))
    gradient = torch.randn(owned_shards[0].shard.numel, generator=draw).to(torch.bfloat16)
    for owned in owned_shards:
        owned.own_place(0).copy_(gradient)
        owned.take_gradient(0, owned.own_place(0))
        owned.apply(make_scratch(), step=0, grad_scale=1.0)
    exact, rounded = owned_shards
    assert torch.equal(exact.param, rounded.param) and exact.published is exact.param
    assert torch.equal(rounded.published, rounded.param.to(torch.bfloat16))
    assert not torch.equal(rounded.published.float(), rounded.param)


@pytest.mark.parametrize("numel", [1_000, 20_000_000], ids=["one block", "two blocks"])
@pytest.mark.parametrize("since", ["nothing", "other gradients", "other gradients for one rank"])
def test_an_update_is_that_of_its_gradients_whatever_was_measured(numel: int, since: str) -> None:
    def updated(*, measure: bool) -> torch.Tensor:
        owned, _ = make(numel=numel)
        for rank, part in enumerate(gradients(owned, 3, 1)):
            owned.take_gradient(rank, part)
        if measure:
            owned.squared_norm(make_scratch())
        if since == "other gradients":
            owned.drop_pushes()
        if since != "nothing":
            ranks = 3 if since == "other gradients" else 1
            for rank, part in enumerate(gradients(owned, ranks, 2)):
                owned.take_gradient(rank, part)
        owned.apply(make_scratch(), step=0, grad_scale=0.3)
        return owned.param

    assert torch.equal(updated(measure=True), updated(measure=False))


def test_one_measure_serves_one_update() -> None:
    once, _ = make()
    for seed in (1, 2):
        for rank, part in enumerate(gradients(once, 2, seed)):
            once.take_gradient(rank, part)
        if seed == 1:
            once.squared_norm(make_scratch())
        once.apply(make_scratch(), step=seed, grad_scale=1.0)
    never, _ = make()
    for seed in (1, 2):
        for rank, part in enumerate(gradients(never, 2, seed)):
            never.take_gradient(rank, part)
        never.apply(make_scratch(), step=seed, grad_scale=1.0)
    assert torch.equal(once.param, never.param)
