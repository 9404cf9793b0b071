"""The kernels that apply optimizers: torch.optim's results, in stable bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from psa_store import optim
from psa_store.job.layout import Layout, Shard, TensorRole, TensorSpec, make_layout
from psa_store.optim import kernels as kernels_module
from psa_store.optim.kernels import ShardKernel, init_slots, make_scratch
from psa_store.optim.reduce import clip_factor, squared_norm
from psa_store.optim.slots import slot_dtype, slot_names
from psa_store.optim.tensors import name_of
from tests.unit.optimizer_models import SHAPES, Model, Reference, largest_error, train_both, with_all_of_it
from tests.unit.optimizers import EVERY_OPTIMIZER, OPTIMIZERS


def assert_agree(model: Model, reference: Reference, rtol: float, atol: float) -> None:
    ours = model.unflatten(model.params)
    for name, param in reference.params.items():
        torch.testing.assert_close(ours[name], param.detach(), rtol=rtol, atol=atol)
    dtype = name_of(model.dtype)
    for key in slot_names(model.optimizer, dtype):
        ours = model.unflatten([slots[key] for slots in model.slots])
        for name in SHAPES:
            torch.testing.assert_close(ours[name], reference.slot(name, key), rtol=rtol, atol=atol)


@EVERY_OPTIMIZER
def test_every_optimizer_gives_the_parameters_and_state_of_torch(optimizer: optim.Optimizer) -> None:
    assert_agree(*train_both(optimizer), rtol=2e-6, atol=1e-6)


@pytest.fixture
def scalars_are_double() -> Iterator[None]:
    """Let torch keep its own scalars, such as NAdam's product of momentum, in double precision, as the kernels do."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@EVERY_OPTIMIZER
@pytest.mark.usefixtures("scalars_are_double")
def test_double_precision_parameters_have_double_precision_state(optimizer: optim.Optimizer) -> None:
    assert set(slot_dtype(optimizer, "float64").values()) <= {"float64"}
    assert_agree(*train_both(optimizer, "float64"), rtol=1e-12, atol=1e-12)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fifty_steps_with_groups_a_schedule_and_clipping_are_those_of_torch(
    optimizer: optim.Optimizer, dtype: str
) -> None:
    assert largest_error(with_all_of_it(optimizer), dtype) < 1e-6


def test_groups_schedules_and_clipping_give_the_results_of_torch() -> None:
    schedule = optim.warmup_cosine(1e-2, warmup=5, total=20, final=1e-3)
    optimizer = optim.AdamW(
        schedule,
        weight_decay=0.3,
        clip_grad_norm=5.0,
        groups=[
            optim.group("*.bias", lr_scale=3.0, weight_decay=0.0),
            optim.group("matrices", eps=1e-3),
        ],
    )
    assert_agree(*train_both(optimizer, steps=30), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("cls", [optim.SGD, optim.RMSprop])
def test_momentum_of_one_group_only(cls: type[optim.SGD] | type[optim.RMSprop]) -> None:
    optimizer = cls(1e-2, groups=[optim.group("vectors", momentum=0.9)])
    model, reference = train_both(optimizer)
    ours = model.unflatten(model.params)
    for name, param in reference.params.items():
        torch.testing.assert_close(ours[name], param.detach(), rtol=2e-6, atol=1e-6)
    buffers = model.unflatten([slots["momentum_buffer"] for slots in model.slots])
    assert not buffers["0.weight"].any()
    assert buffers["0.bias"].all()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_parameters_follow_their_float32_master(optimizer: optim.Optimizer, dtype: str) -> None:
    model = Model(optimizer, dtype)
    wide = Reference(optimizer, {name: tensor.float() for name, tensor in model.initial.items()})
    for step in range(25):
        grads = model.draw()
        model.update(grads, step)
        wide.update({name: grad.float() for name, grad in grads.items()}, step)
    assert slot_names(optimizer, dtype)[0] == "master"
    assert set(slot_dtype(optimizer, dtype).values()) == {"float32"}
    masters = model.unflatten([slots["master"] for slots in model.slots])
    for name, wide_param in wide.params.items():
        torch.testing.assert_close(masters[name], wide_param.detach(), rtol=2e-6, atol=1e-6)
    for param, slots in zip(model.params, model.slots, strict=True):
        assert torch.equal(param, slots["master"].to(model.dtype))


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_stays_zero(optimizer: optim.Optimizer, dtype: str) -> None:
    model = Model(optimizer, dtype)
    for step in range(5):
        model.update(model.draw(), step, grad_scale=0.5)
    arrays = [model.params, *([slots[key] for slots in model.slots] for key in model.slots[0])]
    assert any(shard.numel - sum(p.length for p in shard.pieces) > 0 for shard in model.layout.shards)
    for flat in arrays:
        for place, _, _, _ in model.places(flat):
            place.zero_()
        assert not any(bool(tensor.any()) for tensor in flat)


@EVERY_OPTIMIZER
def test_a_gradient_scale_is_a_factor_of_the_gradient(optimizer: optim.Optimizer) -> None:
    scaled, plain = Model(optimizer), Model(optimizer)
    for step in range(3):
        grads = scaled.draw()
        scaled.update(grads, step, grad_scale=0.25)
        plain.update({name: grad * 0.25 for name, grad in grads.items()}, step)
    assert_same_bits(scaled.state(), plain.state())


@EVERY_OPTIMIZER
def test_state_that_was_stored_and_loaded_goes_on_with_the_same_bits(optimizer: optim.Optimizer) -> None:
    undisturbed = Model(optimizer)
    gradients = [undisturbed.draw() for _ in range(8)]
    for step, grads in enumerate(gradients):
        undisturbed.update(grads, step)

    first, second = Model(optimizer), Model(optimizer)
    for step, grads in enumerate(gradients[:4]):
        first.update(grads, step)
    for stored, place in zip(first.state(), second.state(), strict=True):
        place.copy_(stored)
    for step, grads in enumerate(gradients[4:], start=4):
        second.update(grads, step)
    assert_same_bits(second.state(), undisturbed.state())


@EVERY_OPTIMIZER
@pytest.mark.parametrize("intra_op_threads", [1, 2])
def test_four_threads_on_four_shards_give_the_bits_of_one(
    optimizer: optim.Optimizer, intra_op_threads: int, torch_threads: Callable[[int], None]
) -> None:
    layout = make_layout([TensorSpec(("w",), (4 << 18,), "float32", TensorRole.TRAINED)], 1 << 20)
    torch_threads(1)
    alone = _train_shards(optimizer, layout, map)
    torch_threads(intra_op_threads)
    with ThreadPoolExecutor(4) as pool:
        together = _train_shards(optimizer, layout, pool.map)
    assert len(layout.shards) == 4
    assert_same_bits(together, alone)


def _train_shards(optimizer: optim.Optimizer, layout: Layout, run: Callable[..., Any]) -> list[Tensor]:
    def train(shard: Shard) -> list[Tensor]:
        random = torch.Generator().manual_seed(shard.index)
        param = torch.randn(shard.numel, generator=random)
        slots = init_slots(optimizer, param, shard, layout)
        kernel = ShardKernel(optimizer, layout, shard, param, slots)
        for step in range(4):
            grad = torch.randn(shard.numel, generator=random)
            kernel.apply([grad], make_scratch(), step=step, opt_step=step, grad_scale=0.7)
        return [param, *slots.values()]

    return [tensor for tensors in run(train, layout.shards) for tensor in tensors]


def test_neighbours_of_one_group_are_updated_as_one_run() -> None:
    specs = [TensorSpec((f"w{i}",), (33,), "float32", TensorRole.TRAINED, group=i // 50) for i in range(100)]
    optimizer = optim.SGD(0.1, groups=[optim.group("nothing", lr_scale=2.0)])
    layout = make_layout(specs, 1 << 20)
    param = torch.zeros(layout.shards[0].numel)
    kernel = ShardKernel(optimizer, layout, layout.shards[0], param, {})
    assert [block.lengths for block in kernel._blocks] == [[50 * 48, 50 * 48]]


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_size_of_blocks_does_not_show(
    optimizer: optim.Optimizer, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for block in (64, 512, 1 << 18):
        monkeypatch.setattr(kernels_module, "BLOCK_ELEMENTS", block)
        model = Model(optimizer, dtype)
        for step in range(3):
            model.update(model.draw(), step, grad_scale=0.3)
        states.append(model.state())
    assert_same_bits(states[1], states[0])
    assert_same_bits(states[2], states[0])


def test_slots_have_the_names_of_torch_in_a_fixed_order() -> None:
    assert slot_names(optim.SGD(0.1), "float32") == ()
    assert slot_names(optim.SGD(0.1), "bfloat16") == ("master",)
    assert slot_names(OPTIMIZERS["sgd_momentum"], "float32") == ("momentum_buffer",)
    assert slot_names(optim.AdamW(), "float16") == ("master", "exp_avg", "exp_avg_sq")
    assert slot_names(optim.Adagrad(), "float64") == ("sum",)
    assert slot_names(OPTIMIZERS["rmsprop_full"], "float32") == ("square_avg", "grad_avg", "momentum_buffer")


@given(st.integers(0, 100_000), st.integers(0, 99))
def test_squared_norm_is_exact_to_float32(numel: int, seed: int) -> None:
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    assert squared_norm(flat) == pytest.approx(float(flat.double().square().sum()), rel=1e-5)
    assert squared_norm(flat.double()) == pytest.approx(float(flat.double().square().sum()), rel=1e-12)


def test_squared_norm_stays_exact_for_large_shards() -> None:
    flat = torch.full((1 << 24,), 0.1)
    assert squared_norm(flat) == pytest.approx(float(flat[0]) ** 2 * flat.numel(), rel=1e-5)


def test_squared_norm_does_not_depend_on_threads(torch_threads: Callable[[int], None]) -> None:
    flat = torch.randn(3_000_017, generator=torch.Generator().manual_seed(0))
    torch_threads(1)
    alone = squared_norm(flat)
    torch_threads(2)
    assert squared_norm(flat) == alone


@pytest.mark.parametrize("place", [0, 20_000, 40_000])
def test_squared_norm_shows_nan_and_infinity_wherever_they_are(place: int) -> None:
    flat = torch.ones(40_001)
    flat[place] = math.inf
    assert squared_norm(flat) == math.inf
    flat[place] = math.nan
    assert math.isnan(squared_norm(flat))


def test_squared_norm_of_large_finite_values_is_finite() -> None:
    flat = torch.full((40_001,), torch.finfo(torch.float32).max)
    assert squared_norm(flat) == pytest.approx(40_001 * float(flat[0]) ** 2, rel=1e-9)


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=5), st.floats(1e-3, 1e3))
def test_clip_factor_is_that_of_torch(norms: list[float], max_norm: float) -> None:
    params = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in norms]
    for param, norm in zip(params, norms, strict=True):
        param.grad = torch.tensor([norm], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=False)
    factor = clip_factor([norm * norm for norm in norms], max_norm)
    assert 0.0 < factor <= 1.0
    for param, norm in zip(params, norms, strict=True):
        assert param.grad is not None
        assert norm * factor == pytest.approx(float(param.grad), rel=1e-12)


def test_clip_factor_without_a_limit_still_reports_what_is_not_finite() -> None:
    assert clip_factor([1e30, 4.0], None) == 1.0
    for bad in (math.nan, math.inf):
        assert math.isnan(clip_factor([1.0, bad], None))
        assert math.isnan(clip_factor([1.0, bad], 1.0))


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Set the number of intra-op threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
