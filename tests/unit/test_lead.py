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
from psa_store.layout import Layout, Role, TensorSpec, plan_layout
from psa_store.server import lead as lead_module
from psa_store.server.lead import Lead, as_bytes
from psa_store.storage import Manifest


def make(dtype: str = "float32", numel: int = 5000, role: Role = Role.TRAINED) -> tuple[Lead, Layout]:
    layout = plan_layout([TensorSpec(("w",), (numel - 7,), dtype, role), TensorSpec(("b",), (7,), dtype, role)])
    lead = Lead(layout.shards[0], layout, optim.SGD(lr=0.5))
    lead.loaded(Manifest(0, 1, "", (), {}))
    return lead, layout


def gradients(lead: Lead, ranks: int, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(lead.shard.numel, generator=draw, dtype=torch.float64).to(lead.param.dtype) for _ in range(ranks)
    ]


@settings(deadline=None, max_examples=30)
@given(
    ranks=st.integers(1, 6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
)
def test_gradients_are_added_in_the_order_of_ranks_whoever_came_first(ranks: int, seed: int, dtype: str) -> None:
    lead, _ = make(dtype)
    parts = gradients(lead, ranks, seed)
    arrival = list(range(ranks))
    random.Random(seed).shuffle(arrival)
    for rank in arrival:
        as_bytes(lead.gradient(rank))[:] = as_bytes(parts[rank])
    wide = torch.float64 if dtype == "float64" else torch.float32
    expected = parts[0].to(wide)
    for part in parts[1:]:
        expected += part
    expected *= 1.0 / ranks
    norm = lead.reduce(ranks)
    assert torch.equal(lead._sum_place(), expected)
    assert math.isclose(norm, float(expected.double().square().sum()), rel_tol=1e-5)


def test_the_size_of_blocks_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for block in (64, 1000, 1 << 16):
        monkeypatch.setattr(lead_module, "BLOCK_ELEMENTS", block)
        lead, _ = make()
        for rank, part in enumerate(gradients(lead, 3, 1)):
            lead.gradient(rank).copy_(part)
        results.append((lead.reduce(3), lead._sum_place().clone()))
    assert all(norm == results[0][0] and torch.equal(total, results[0][1]) for norm, total in results)


def test_shards_updated_by_many_threads_have_the_bits_of_one() -> None:
    def update(seed: int) -> torch.Tensor:
        torch.set_num_threads(1)
        lead, _ = make(numel=40_000)
        for rank, part in enumerate(gradients(lead, 2, seed)):
            lead.gradient(rank).copy_(part)
        lead.reduce(2)
        lead.apply(step=0, grad_scale=0.3)
        return lead.param

    alone = [update(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(update, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_rank_and_the_parameter_of_a_nan_are_found(dtype: str, culprit: int, bad: float) -> None:
    lead, layout = make(dtype)
    for rank, part in enumerate(gradients(lead, 3, 5)):
        lead.gradient(rank).copy_(part)
    element = next(piece.shard_start for piece in lead.shard.pieces if layout.tensors[piece.tensor].name == "b")
    lead.gradient(culprit)[element + 3] = bad
    assert not math.isfinite(lead.reduce(3))
    assert lead.nonfinite(3) == {culprit: "b"}


def test_a_snapshot_does_not_follow_the_next_step() -> None:
    lead, _ = make()
    lead.take_snapshot()
    before = bytes(lead.snapshot()[0]["param"][1])
    lead.gradient(0).fill_(1.0)
    lead.reduce(1)
    lead.apply(step=0, grad_scale=1.0)
    arrays, scalars = lead.snapshot()
    assert bytes(arrays["param"][1]) == before != bytes(as_bytes(lead.param))
    assert scalars == {"opt_step": 0} and lead.opt_step == 1


def test_buffers_are_taken_over_from_rank_0() -> None:
    lead, _ = make(role=Role.BUFFER)
    lead.gradient(0).fill_(3.0)
    lead.apply(step=0, grad_scale=1.0)
    assert bool((lead.param == 3.0).all())
