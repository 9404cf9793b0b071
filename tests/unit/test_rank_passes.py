"""The passes of one rank with real modules: the same bits whichever workers hold its stages, and if they move."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psa_store.errors import UsageError
from psa_store.job.layout import make_layout
from psa_store.job.wire_layout import WireLayout
from psa_store.worker.batches import RankStep
from psa_store.worker.carry import Parcel, by_value, read
from psa_store.worker.gradients import GradientMemory
from psa_store.worker.rank_passes import RankPasses, ties_of
from psa_store.worker.stages import BuildStage, StagedModel, describe_stages

STAGES, MICROBATCHES, WIDTH, SEED = 3, 4, 37, 5
Key = tuple[int, int, bool]


class Part(nn.Module):
    """Returns two tensors, one of which does not lie in order; draws random numbers; a buffer changes what it does."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage
        setattr(self, f"linear{stage}", nn.Linear(WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.2)
        self.register_buffer(f"drift{stage}", torch.zeros(1))

    def forward(self, carry: Any, microbatch: Tensor) -> Any:
        x = microbatch if carry is None else torch.cat([carry[0].T, carry[1]])
        drift = self.get_buffer(f"drift{self.stage}")
        x = self.dropout(torch.tanh(getattr(self, f"linear{self.stage}")(x + drift)))
        drift.add_(0.1)
        if self.stage == STAGES - 1:
            return x.square().mean(), float(len(microbatch))
        half = len(x) // 2
        return x[:half].T, x[half:]


BUILDERS = [lambda stage=stage: Part(stage) for stage in range(STAGES)]  # type: ignore[misc]
LAYOUT = make_layout(describe_stages(BUILDERS, SEED, lambda name, shape: 0), 4096)
BATCH = torch.randn(MICROBATCHES * 6, WIDTH, generator=torch.Generator().manual_seed(1)).split(6)


class Scene:
    """Workers in one process; what they send each other is kept, and goes by value.

    ``resident_max``: how many stages these workers can have in memory at once; the others, all.
    """

    def __init__(
        self,
        holders: Sequence[str],
        resident_max: Mapping[str, int] = MappingProxyType({}),
        builders: Sequence[BuildStage] = BUILDERS,
    ) -> None:
        self.found: dict[int, list[Tensor]] = {}
        self._resident_max, self._builders = resident_max, builders
        self.sent: dict[Key, bytes] = {}
        self.workers: dict[str, tuple[StagedModel, RankPasses]] = {}
        self._inbox: defaultdict[str, deque[Key]] = defaultdict(deque)
        self.hold(holders)

    def hold(self, holders: Sequence[str]) -> None:
        self.holders = list(holders)
        for name in sorted({*holders, *self.workers}):
            if name not in self.workers:
                model = StagedModel(self._builders, LAYOUT, SEED, resident_max=self._resident_max.get(name))
                passes = RankPasses(RankStep(2, 1), BATCH, STAGES, ties_of(LAYOUT), model, SEED, self._send)
                self.workers[name] = model, passes
            model, passes = self.workers[name]
            stages = [stage for stage, holder in enumerate(holders) if holder == name]
            if model.resident_max is None:
                model.hold({*model.stages, *stages})
            for stage in set(stages) - set(passes.held):
                if model.resident_max is None:
                    model.flat(stage).begin(GradientMemory(LAYOUT, WireLayout(LAYOUT)), None)
                self._inbox[name].extend(key for key in self.sent if key[0] == stage)
            passes.hold(stages)

    def reside(self, name: str) -> bool:
        """Have other stages in memory, if they are due."""
        model, passes = self.workers[name]
        due = passes.residence_due
        if due is None:
            return False
        self.collect(name)
        model.hold(due.stages)
        for stage in due.stages:
            model.flat(stage).begin(GradientMemory(LAYOUT, WireLayout(LAYOUT)), None)
        passes.reside(due)
        return True

    def collect(self, name: str) -> None:
        """Note the weight of the rank and the gradients of the stages that are whole."""
        model, passes = self.workers[name]
        for stage in set(passes.whole) - set(self.found):
            weight = torch.tensor(passes.complete(stage))
            gradients = [p.grad.clone() for p in model.module(stage).parameters() if p.grad is not None]
            self.found[stage] = [weight, *gradients, *(buffer.clone() for buffer in model.module(stage).buffers())]

    def _send(self, stage: int, microbatch: int, backward: bool, parcel: Parcel) -> None:
        key, payload = (stage, microbatch, backward), bytes(by_value(parcel))
        assert self.sent.setdefault(key, payload) == payload, "computed again, it is the same"
        self._inbox[self.holders[stage]].append(key)

    def run(self, turns: int = -1) -> None:
        """Let each make so many passes, or all that it can."""
        moved = True
        while moved and turns:
            moved, turns = False, turns - 1
            for name, (_, passes) in self.workers.items():
                while self._inbox[name]:
                    key = self._inbox[name].popleft()
                    passes.arrived(*key, read(memoryview(bytearray(self.sent[key])), None))
                moved |= passes.turn() or self.reside(name)

    def result(self) -> list[Tensor]:
        """The loss, the weight of the rank, and all gradients."""
        for name in set(self.holders):
            assert self.workers[name][1].finished
            self.collect(name)
        found = [each for stage in sorted(self.found) for each in self.found[stage]]
        loss = self.workers[self.holders[-1]][1].loss
        assert loss is not None
        return [loss, *found]

    def close(self) -> None:
        for model, _ in self.workers.values():
            model.close()


def result_of(
    holders: Sequence[str],
    moves: Sequence[tuple[int, Sequence[str]]] = (),
    resident_max: Mapping[str, int] = MappingProxyType({}),
) -> list[Tensor]:
    scene = Scene(holders, resident_max)
    for turns, moved in moves:
        scene.run(turns)
        scene.hold(moved)
    scene.run()
    result = scene.result()
    scene.close()
    return result


@cache
def alone() -> list[Tensor]:
    return result_of("aaa")


@pytest.mark.parametrize("holders", ["aab", "abb", "aba", "abc"])
def test_the_bits_do_not_depend_on_which_worker_holds_which_stage(holders: str) -> None:
    assert len(alone()) == 1 + 4 * STAGES
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(result_of(holders), alone(), strict=True))


@pytest.mark.parametrize("turns", [0, 1, 3, 6, 10])
@pytest.mark.parametrize(("before", "after"), [("aaa", "aba"), ("aaa", "bba"), ("aba", "aaa"), ("aab", "abb")])
def test_nor_on_stages_that_move_in_the_middle(before: str, after: str, turns: int) -> None:
    """What went from one stage to the next in a worker follows the next one when that goes."""
    moved = result_of(before, [(turns, after)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(moved, alone(), strict=True))


@pytest.mark.parametrize(
    ("holders", "resident_max"), [("aaa", {"a": 1}), ("aaa", {"a": 2}), ("abb", {"b": 1}), ("aba", {"a": 1})]
)
def test_nor_on_how_many_stages_a_worker_has_in_memory(holders: str, resident_max: dict[str, int]) -> None:
    some = result_of(holders, resident_max=resident_max)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(some, alone(), strict=True))


def test_a_pass_that_is_made_twice_with_unlike_results_is_refused() -> None:
    called: list[int] = []

    class Counting(Part):
        def forward(self, carry: Any, microbatch: Tensor) -> Any:
            called.append(1)
            return super().forward(carry, microbatch + len(called))

    scene = Scene("aaa", {"a": 1}, [lambda: Counting(0), *BUILDERS[1:]])
    with pytest.raises(UsageError, match=r"stage 0 of rank 1 was computed twice in step 2.*resident_stages=1"):
        scene.run()
    scene.close()
