"""What a process needs for a stage depends on that stage, however large the others are."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import psa_store as psa
from psa_store.checkpoint.creation import _STREAM_BYTES, _streams
from psa_store.errors import OutOfMemory
from psa_store.job.layout import make_layout
from psa_store.job.wire_layout import WireLayout
from psa_store.storage import ShardState
from psa_store.worker.gradients import GradientMemory, GradientPool
from psa_store.worker.host_memory import must_suffice
from psa_store.worker.stages import StagedModel, describe_stages

WIDTHS = 64, 1 << 18, 64
"""The one in the middle has 256 GiB of parameters: no machine that runs tests has room for it."""
SLACK_BYTES = 64 << 20


class Part(nn.Module):
    def __init__(self, stage: int, width: int) -> None:
        super().__init__()
        self.name = f"layer{stage}"
        setattr(self, self.name, nn.Linear(width, width))

    def forward(self, carry: Any, microbatch: Tensor) -> Tensor:
        layer: nn.Linear = getattr(self, self.name)
        out: Tensor = layer(microbatch)
        return out


STAGES = [partial(Part, stage, width) for stage, width in enumerate(WIDTHS)]
LAYOUT = make_layout(describe_stages(STAGES, 0, lambda name, shape: 0))


def addresses_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[0]) * 4096


def test_parameters_and_gradients_of_other_stages_take_no_addresses() -> None:
    model, wire = StagedModel(STAGES, LAYOUT, 0), WireLayout(LAYOUT)
    before = addresses_bytes()
    model.hold([0])
    gradients = GradientMemory(LAYOUT, wire, [0])
    gradients.add([2])
    model.hold([0, 2])
    for stage in (0, 2):
        model.flat(stage).begin(gradients, None)
        model.module(stage)(None, torch.ones(1, 64)).sum().backward()
        model.flat(stage).end(1.0)
        shard = next(each for each in LAYOUT.shards if each.home == stage)
        assert float(gradients.numbers[shard.index].sum()) == 64 * 64 + 64
    assert addresses_bytes() - before < SLACK_BYTES
    model.close()


def test_memory_for_gradients_is_used_again_and_a_stage_that_has_gone_has_none_of_it() -> None:
    """Servers keep what was passed to them, and allow a few: other stages, again and again, take no new ones."""
    pool = GradientPool(LAYOUT, WireLayout(LAYOUT))
    memory = pool.take_for(1, (0, 2), shared=True)
    for step in range(2, 8):
        assert pool.take_for(step, (2, 0), shared=True) is memory
        for numbers in memory.numbers.values():
            numbers.fill_(1.0)
        both, size = set(memory.numbers), os.fstat(memory.shared.fd).st_blocks
        assert pool.take_for(step + 10, (2,), shared=True) is memory and set(memory.numbers) < both
        memory.numbers[max(both)].fill_(1.0)
        assert os.fstat(memory.shared.fd).st_blocks == size // 2


def test_a_creator_has_one_stream_of_shards_at_a_time() -> None:
    small = make_layout(describe_stages([STAGES[0]], 0, lambda name, shape: 0), 4096)
    alive: list[int] = []
    counts = []

    class Bytes(bytearray):
        def __del__(self) -> None:
            alive.pop()

    def states() -> Any:
        for shard in [small.shards[0]] * 12:
            alive.append(1)
            counts.append(len(alive))
            yield ShardState(shard.index, {"p": ("uint8", memoryview(Bytes(_STREAM_BYTES // 4)))}, {}, expect=None)

    assert [len(some) for _, some in _streams(small, 0, states())] == [4, 4, 4]
    assert max(counts) <= 6, "of four that are a stream, and one that is on its way"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_what_does_not_fit_is_said_in_words(error: Exception) -> None:
    with (
        pytest.raises(OutOfMemory, match=r"test_stage_memory\.py") as caught,
        must_suffice("build stage 1 of 2", 1 << 20),
    ):
        raise error
    for words in ("build stage 1 of 2", "1.0 MB of parameters", "more stages", "more memory"):
        assert words in str(caught.value)


def test_torch_says_so_in_the_words_that_are_looked_for() -> None:
    with pytest.raises(OutOfMemory), must_suffice("compute stage 0", 0):
        torch.empty(1 << 55)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), must_suffice("compute stage 0", 0):
        raise RuntimeError("shapes do not fit")


class Cyclic(Part):
    def __init__(self, stage: int, width: int) -> None:
        super().__init__(stage, width)
        self.itself = [self]


MODEL = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


@pytest.mark.parametrize(
    "stages",
    [
        [partial(Part, stage, 64) for stage in range(2)],
        [partial(Cyclic, stage, 64) for stage in range(2)],
        psa.split(MODEL, ["2"], loss=lambda out, microbatch: out.sum()),
    ],
    ids=["by hand", "cyclic", "split"],
)
def test_a_stage_that_goes_takes_its_memory_along_at_once(stages: list[Any]) -> None:
    layout = make_layout(describe_stages(stages, 0, lambda name, shape: 0))
    model = StagedModel(stages, layout, 0)
    gc.collect()
    gc.disable()  # what runs by itself, whenever that is
    try:
        model.hold([0, 1])
        model.flat(1).begin(GradientMemory(layout, WireLayout(layout), [1]), None)
        model.module(1)(torch.ones(1, 64), torch.ones(1, 64)).sum().backward()
        model.flat(1).end(1.0)
        left = [weakref.ref(each) for each in (model.module(1), model.flat(1), *model.module(1).parameters())]
        model.hold([0])
        assert [each() for each in left] == [None] * len(left)
    finally:
        gc.enable()
        model.close()
