"""worker.state with stages: it is changed where the loss of rank 0 is, and lies in a buffer that all stages have."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import psa_store as psa
from psa_store import logs
from psa_store.errors import UsageError
from psa_store.job.layout import Layout, TensorRole, make_layout
from psa_store.worker.batches import RankStep
from psa_store.worker.staged_state import StagedScriptState
from psa_store.worker.stages import StagedModel, describe_stages

ELSEWHERE = r"worker.state was changed where the loss of rank 0 was not.*`if loss is not None and worker.rank == 0:`"


class Counting(nn.Module):
    """A stage with a buffer whose dtype is that of the state."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(2, 2))
        self.register_buffer(f"{name}_count", torch.zeros(3, dtype=torch.uint8))


def layout_of(stages: int, state: StagedScriptState) -> Layout:
    builders = [partial(Counting, f"part{stage}") for stage in range(stages)]
    layout = make_layout(describe_stages(builders, 0, lambda name, shape: 0, state), 4096)
    state.lies_in(layout)
    return layout


@pytest.fixture
def state() -> StagedScriptState:
    """Of the present version of a job in two stages."""
    return StagedScriptState({"seen": 0}, 2)


def passes_of(state: StagedScriptState, rank: int, *stages: int) -> None:
    state.begin(RankStep(5, rank))
    state.computing()
    state.computed(rank, stages)


def test_all_stages_have_it_and_the_last_one_pushes_it(state: StagedScriptState) -> None:
    layout = layout_of(2, state)
    (spec,) = (each for each in layout.tensors if each.name == "psa_state")
    assert (spec.role, spec.persistent, spec.home) == (TensorRole.BUFFER, False, 1)
    assert set(spec.stages) == {0, 1}
    assert len(state.shards) == 4
    assert {layout.shards[index].home for index in state.shards} == {1}


@pytest.mark.parametrize("stages", [1, 2])
def test_what_is_pushed_is_what_another_worker_finds_with_the_version(stages: int) -> None:
    """In one stage the shards also have the model's own buffers."""
    state, other = StagedScriptState({"seen": 0}, stages), StagedScriptState({"seen": 0}, stages)
    layout = layout_of(stages, state)
    other.lies_in(layout)
    passes_of(state, 0, *range(stages))
    state.values["seen"] = [1, torch.arange(2)]
    state.save(RankStep(5, 0))
    for index in state.shards:
        shard = layout.shards[index]
        pushed = state.to_push(shard, bytes([7]) * shard.size_bytes)
        own = [piece for piece in shard.pieces if layout.tensors[piece.tensor].name != "psa_state"]
        assert all(pushed[each.shard_start : each.shard_start + each.length] == b"\7" * each.length for each in own)
        other.arrived(index, memoryview(pushed))
    other.begin(RankStep(6, 1))
    assert other.values["seen"][0] == 1
    assert torch.equal(other.values["seen"][1], torch.arange(2))


@pytest.mark.parametrize(("rank", "stages"), [(0, (0,)), (1, (0, 1))])
def test_a_change_where_another_loss_is_or_none_is_refused(
    state: StagedScriptState, rank: int, stages: tuple[int, ...]
) -> None:
    passes_of(state, rank, *stages)
    state.values["seen"] = 1
    with pytest.raises(UsageError, match=ELSEWHERE):
        state.save(RankStep(5, rank))


def test_a_change_before_the_passes_or_after_the_step_is_refused(state: StagedScriptState) -> None:
    state.begin(RankStep(5, 0))
    state.values["seen"] = 1
    with pytest.raises(UsageError, match=ELSEWHERE):
        state.computing()
    state = StagedScriptState({"seen": 0}, 2)
    passes_of(state, 0, 1)
    state.save(RankStep(5, 0))
    state.values["seen"] = 1
    with pytest.raises(UsageError, match=ELSEWHERE):
        state.begin(RankStep(6, 0))


def test_a_change_in_a_batch_that_comes_again_does_not_count(state: StagedScriptState) -> None:
    """The passes were given up, as a server died: the script may not have looked at the loss."""
    passes_of(state, 0)
    state.values["seen"] = 1
    state.save(RankStep(5, 0))
    state.load()
    assert state.values == {"seen": 0}
    state.begin(RankStep(5, 0))


def test_another_rank_of_the_same_version_finds_what_the_version_has(state: StagedScriptState) -> None:
    passes_of(state, 0, 1)
    state.values["seen"] = 1
    state.save(RankStep(5, 0))
    state.load()
    assert state.values == {"seen": 0}


def test_a_change_after_the_last_step_is_said_to_be_lost(
    state: StagedScriptState, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", "test")
    state.values["seen"] = 1
    state.end()
    assert state.values == {"seen": 0}
    assert "is lost" in capsys.readouterr().err


def test_what_is_too_large_is_refused_and_what_is_no_dictionary(state: StagedScriptState) -> None:
    passes_of(state, 0, 1)
    state.values["seen"] = "x" * 20_000
    with pytest.raises(UsageError, match="there is room for 16384"):
        state.save(RankStep(5, 0))
    with pytest.raises(UsageError, match="give a dictionary"):
        StagedScriptState([1], 2)  # type: ignore[arg-type]


def test_the_model_in_stages_hands_it_what_comes(state: StagedScriptState) -> None:
    layout = layout_of(2, state)
    writer = StagedScriptState({"seen": 0}, 2)
    writer.lies_in(layout)
    passes_of(writer, 0, 1)
    writer.values["seen"] = 9
    writer.save(RankStep(5, 0))
    model = StagedModel([partial(Counting, f"part{stage}") for stage in range(2)], layout, 0, state)
    model.hold([0])
    model.fill([0])
    for index in state.shards:
        shard = layout.shards[index]
        model.place(shard)[:] = writer.to_push(shard, bytes(shard.size_bytes))
    model.version_arrived()
    state.load()
    assert state.values == {"seen": 9}
    model.close()


def test_a_split_model_has_it_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = StagedScriptState({}, 2)
    specs = describe_stages(psa.split(model, ["1"]), 0, lambda name, shape: 0, state)
    assert [each.stages for each in specs if each.name == "psa_state"] == [(1, 0)]
