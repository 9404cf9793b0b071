"""Parameters without a gradient, and ranks that count more than others: as torch.optim does, in stable bits."""

from __future__ import annotations

import pytest
import torch

import psa_store as psa
from psa_store import optim
from psa_store.job.average import Average
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.kernels import make_scratch
from psa_store.optim.note import PLAIN, GradientNote, from_marks, left_out, to_marks
from psa_store.optim.slots import AVERAGE
from psa_store.server.shard import OwnedShard
from psa_store.storage import Manifest
from psa_store.storage.head import Section
from psa_store.wire import SharedMemory
from tests.unit.optimizers import EVERY_OPTIMIZER, OPTIMIZERS, Lion

SIZES = (70, 33, 1, 500)
STEPS = 30


def make(optimizer: optim.Optimizer, dtype: str = "float32", average: Average | None = None) -> OwnedShard:
    specs = [TensorSpec((str(i),), (size,), dtype, TensorRole.TRAINED) for i, size in enumerate(SIZES)]
    layout = make_layout(specs)
    assert len(layout.shards) == 1
    shard = layout.shards[0]
    memory = SharedMemory.create("test", layout.arena_bytes)
    owned = OwnedShard(shard, layout, WireLayout(layout), optimizer, memory, average=average)
    draw = torch.Generator().manual_seed(1)
    for piece in shard.pieces:
        place = owned.param[piece.shard_start : piece.shard_start + piece.length]
        place.copy_(torch.randn(piece.length, generator=draw))
    owned.loaded(Manifest(0, 1, "", (), {}))
    return owned


def cut(owned: OwnedShard, flat: torch.Tensor) -> list[torch.Tensor]:
    return [flat[piece.shard_start : piece.shard_start + piece.length] for piece in owned.shard.pieces]


def absent_in(step: int) -> frozenset[int]:
    """One never, one always but for one step, one at times."""
    always = set() if step == 7 else {1}
    return frozenset(always | ({3} if step % 3 == 0 else set()))


def torch_twin(optimizer: optim.Optimizer, owned: OwnedShard) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    twins = [torch.nn.Parameter(each.float().clone()) for each in cut(owned, owned.param)]
    numbers = {k: v for k, v in optimizer.to_dict().items() if k not in ("name", "clip_grad_norm", "groups")}
    return twins, getattr(torch.optim, type(optimizer).__name__, Lion)(twins, foreach=False, **numbers)


def draw_gradients(step: int, absent: frozenset[int]) -> list[torch.Tensor | None]:
    draw = torch.Generator().manual_seed(100 + step)
    gradients = [torch.randn(size, generator=draw) for size in SIZES]
    return [None if i in absent else gradient for i, gradient in enumerate(gradients)]


def give(owned: OwnedShard, rank: int, gradients: list[torch.Tensor | None], note: GradientNote) -> None:
    flat = torch.zeros(owned.shard.numel)
    for place, gradient in zip(cut(owned, flat), gradients, strict=True):
        if gradient is not None:
            place.copy_(gradient)
    owned.take_gradient(rank, flat, note)


@EVERY_OPTIMIZER
def test_what_no_rank_gave_a_gradient_is_skipped_as_in_torch(optimizer: optim.Optimizer) -> None:
    owned = make(optimizer)
    twins, reference = torch_twin(optimizer, owned)
    for step in range(STEPS):
        absent = absent_in(step)
        gradients = draw_gradients(step, absent)
        give(owned, 0, gradients, GradientNote(absent=absent))
        owned.apply(make_scratch(), step=step, grad_scale=1.0)
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient
        reference.step()
    for ours, twin in zip(cut(owned, owned.param), twins, strict=True):
        torch.testing.assert_close(ours, twin.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd_momentum"])
def test_a_server_that_takes_over_goes_on_with_the_same_bits(name: str) -> None:
    def steps(owned: OwnedShard, low: int, high: int) -> None:
        for step in range(low, high):
            give(owned, 0, draw_gradients(step, absent_in(step)), GradientNote(absent=absent_in(step)))
            owned.apply(make_scratch(), step=step, grad_scale=1.0)

    whole, first, second = make(OPTIMIZERS[name]), make(OPTIMIZERS[name]), make(OPTIMIZERS[name])
    steps(whole, 0, STEPS)
    steps(first, 0, 12)
    first.take_snapshot()
    arrays, scalars = first.snapshot()
    sections = tuple(Section(each, dtype, len(data), ()) for each, (dtype, data) in arrays.items())
    manifest = Manifest(12, 1, "", sections, scalars)
    for each, place in second.places(manifest).items():
        place[:] = arrays[each][1]
    second.loaded(manifest)
    steps(second, 12, STEPS)
    assert torch.equal(whole.param, second.param)


def test_a_rank_with_a_gradient_is_enough() -> None:
    """And one without it counts as zero, as DistributedDataParallel has it."""
    owned = make(optim.SGD(lr=1.0))
    before = [each.clone() for each in cut(owned, owned.param)]
    ones: list[torch.Tensor | None] = [torch.ones(size) for size in SIZES]
    give(owned, 0, ones, PLAIN)
    give(owned, 1, [None, *ones[1:]], GradientNote(absent=frozenset({0})))
    owned.apply(make_scratch(), step=0, grad_scale=1.0)
    for tensor, (was, now) in enumerate(zip(before, cut(owned, owned.param), strict=True)):
        torch.testing.assert_close(now, was - (0.5 if tensor == 0 else 1.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_count_by_their_weights(dtype: str) -> None:
    owned = make(optim.SGD(lr=1.0, clip_grad_norm=1.0), dtype)
    before = owned.param.clone()
    weights = (3.0, 0.0, 17.0)
    for rank, weight in enumerate(weights):
        owned.take_gradient(
            rank, torch.full((owned.shard.numel,), float(rank + 1)).to(owned.param.dtype), GradientNote(weight)
        )
    mean = (3 * 1 + 17 * 3) / 20
    assert owned.squared_norm(make_scratch()) == pytest.approx(mean**2 * owned.shard.numel)
    owned.apply(make_scratch(), step=0, grad_scale=0.5)
    torch.testing.assert_close(owned.param, (before.float() - 0.5 * mean).to(before.dtype))


def test_a_step_without_any_rank_is_no_update() -> None:
    """The next one is the first, for the bias correction and for the average."""
    owned, twin = make(optim.AdamW(lr=0.1), average=psa.ema(0.5)), make(optim.AdamW(lr=0.1), average=psa.ema(0.5))
    before = owned.param.clone()
    for rank in range(2):
        owned.take_gradient(rank, torch.ones(owned.shard.numel), GradientNote(0.0))
    assert owned.squared_norm(make_scratch()) == 0.0
    owned.apply(make_scratch(), step=0, grad_scale=1.0)
    assert torch.equal(owned.param, before)
    for each in (owned, twin):
        each.take_gradient(0, torch.ones(owned.shard.numel))
        each.apply(make_scratch(), step=1, grad_scale=1.0)
    assert torch.equal(owned.param, twin.param)
    assert torch.equal(owned.slots[AVERAGE], owned.param)


def test_what_was_said_of_a_gradient_is_gone_with_it() -> None:
    owned, twin = make(optim.AdamW(lr=0.1)), make(optim.AdamW(lr=0.1))
    owned.take_gradient(0, torch.ones(owned.shard.numel), GradientNote(5.0, frozenset({0})))
    owned.drop_pushes()
    for each in (owned, twin):
        each.take_gradient(0, torch.ones(owned.shard.numel))
        each.apply(make_scratch(), step=0, grad_scale=1.0)
    assert torch.equal(owned.param, twin.param)


def test_marks_travel() -> None:
    shard = make(optim.SGD()).shard
    absent = frozenset({1, 3})
    assert from_marks(to_marks(absent, shard), shard) == absent
    assert left_out([GradientNote(absent=absent), GradientNote(absent=frozenset({3}))], range(4)) == {3}
    assert left_out([GradientNote(absent=absent), GradientNote(0.0)], range(4)) == absent
    assert left_out([GradientNote(0.0)], range(2)) == {0, 1}
