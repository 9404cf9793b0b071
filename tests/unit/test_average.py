"""The average of the parameters: torch's AveragedModel, updated where servers update, and a fact of its job."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import psa_store as psa
from psa_store import optim
from psa_store.errors import DataIntegrity, JobMismatch, UsageError
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.layout import PAGE_BYTES, TensorRole, TensorSpec, make_layout
from psa_store.job.wire_layout import WireLayout
from psa_store.observe.doctor.footprint import footprint_of
from psa_store.optim import kernels
from psa_store.optim.kernels import ShardKernel, init_slots, make_scratch
from psa_store.optim.slots import AVERAGE, slot_dtype, slot_names
from psa_store.optim.tensors import as_bytes, to_torch
from psa_store.server.shard import OwnedShard
from psa_store.storage import Manifest, Section
from psa_store.storage.sections import OPT_STEP
from psa_store.wire import SharedMemory

EMA = psa.ema(0.9)
SHAPES = {"weight": (67, 33), "bias": (33,), "gain": ()}
LAYOUT = make_layout([TensorSpec(("w",), (3000,), "float32", TensorRole.TRAINED)], PAGE_BYTES)
CONFIG = JobConfig("job", 2, 0, optim.SGD(0.1).to_dict(), LAYOUT.fingerprint)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block", [1 << 18, 256])
def test_it_is_that_of_torch_after_every_update(dtype: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's begins as the parameters after the first update; ours follows the float32 copy of those of less."""
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", block)
    rule = optim.AdamW(0.05, groups=[optim.group("bias", weight_decay=0.0)])
    layout = make_layout(
        [
            TensorSpec((name,), shape, dtype, TensorRole.TRAINED, rule.group_of(name, shape))
            for name, shape in SHAPES.items()
        ],
        1 << 20,
    )
    (shard,) = layout.shards
    draw = torch.Generator().manual_seed(4)
    inside = torch.zeros(shard.numel, dtype=torch.bool)
    for piece in shard.pieces:
        inside[piece.shard_start : piece.shard_start + piece.length] = True
    param = (torch.randn(shard.numel, generator=draw) * inside).to(to_torch(dtype))
    slots = init_slots(rule, param, shard, layout, EMA)
    assert torch.equal(slots[AVERAGE], param.to(slots[AVERAGE].dtype)), "before any update it is the parameters"
    kernel = ShardKernel(rule, layout, shard, param, slots, average=EMA)
    wide = slots.get("master", param)
    holder = nn.Module()
    holder.register_parameter("all", nn.Parameter(wide.clone()))
    averaged = AveragedModel(holder, multi_avg_fn=get_ema_multi_avg_fn(EMA.decay))
    for step in range(6):
        gradient = (torch.randn(shard.numel, generator=draw) * inside).to(to_torch(dtype))
        kernel.apply([gradient], make_scratch(), step=step, opt_step=step, grad_scale=1.0)
        with torch.no_grad():
            holder.get_parameter("all").copy_(wide)
        averaged.update_parameters(holder)
        assert torch.equal(slots[AVERAGE], averaged.module.get_parameter("all"))
    assert not slots[AVERAGE][~inside].any(), "padding"
    assert not torch.equal(slots[AVERAGE], wide)


def test_it_is_a_slot_of_trained_shards_of_jobs_that_have_one() -> None:
    rule = optim.SGD(0.1)
    assert slot_names(rule, "float32") == () and slot_names(rule, "bfloat16", EMA) == ("master", AVERAGE)
    assert slot_dtype(rule, "bfloat16", EMA)[AVERAGE] == slot_dtype(rule, "float32", EMA)[AVERAGE] == "float32"
    assert slot_dtype(rule, "float64", EMA)[AVERAGE] == "float64"
    plain, kept = footprint_of(CONFIG, LAYOUT), footprint_of(replace(CONFIG, average=EMA), LAYOUT)
    assert kept.version_bytes == plain.version_bytes + 4 * sum(shard.numel for shard in LAYOUT.shards)


def test_a_shard_that_is_loaded_goes_on_with_its_average() -> None:
    rule = optim.SGD(0.1)

    def owned() -> OwnedShard:
        memory = SharedMemory.create("test", LAYOUT.arena_bytes)
        return OwnedShard(LAYOUT.shards[0], LAYOUT, WireLayout(LAYOUT), rule, memory, average=EMA)

    first, second = owned(), owned()
    first.loaded(Manifest(0, 1, "", (), {}))
    for step in range(4):
        if step == 2:
            first.take_snapshot()
            arrays, scalars = first.snapshot()
            sections = tuple(Section(name, dtype, len(data), ()) for name, (dtype, data) in arrays.items())
            manifest = Manifest(2, 1, "", sections, dict(scalars))
            for name, place in second.places(manifest).items():
                place[:] = arrays[name][1]
            second.loaded(manifest)
            assert second.opt_step == scalars[OPT_STEP] == 2
        for each in (first, second)[: 1 + (step >= 2)]:
            each.take_gradient(0, torch.full_like(each.param, 1.0 + step))
            each.apply(make_scratch(), step=step, grad_scale=1.0)
    assert as_bytes(first.slots[AVERAGE]) == as_bytes(second.slots[AVERAGE])
    assert not torch.equal(first.slots[AVERAGE], first.param)


def test_a_job_without_one_is_stored_as_it_always_was() -> None:
    assert "average" not in CONFIG.to_json() and "average" not in CONFIG.facts()
    assert job_config_from_json(CONFIG.to_json()) == CONFIG
    kept = replace(CONFIG, average=EMA)
    assert kept.facts()["average"] == {"decay": 0.9} and job_config_from_json(kept.to_json()) == kept
    with pytest.raises(DataIntegrity, match="decay"):
        job_config_from_json(kept.to_json().replace("0.9", "1.5"))


def test_an_average_belongs_to_its_job() -> None:
    kept = replace(CONFIG, average=EMA)
    kept.must_agree_with(kept)
    with pytest.raises(JobMismatch, match=r"exists without an average.*leave average= out"):
        kept.must_agree_with(CONFIG)
    with pytest.raises(JobMismatch, match=r"average=\{'decay': 0\.9\}, this process has average=None"):
        CONFIG.must_agree_with(kept)
    with pytest.raises(JobMismatch, match=r"average=\{'decay': 0\.9\}, this process has average=\{'decay': 0\.5\}"):
        replace(CONFIG, average=psa.ema(0.5)).must_agree_with(kept)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), float("inf"), "0.9", True])
def test_a_decay_that_is_none_is_refused(decay: object) -> None:
    with pytest.raises(UsageError, match="decay="):
        psa.ema(decay)  # type: ignore[arg-type]
