"""What a script gives: to psa.Worker, to worker.state, to worker.step(). Seen without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import psa_store as psa
from psa_store import logs
from psa_store.errors import UsageError
from psa_store.worker.batches import RankStep
from psa_store.worker.health import as_reported
from psa_store.worker.script import whole_number
from psa_store.worker.state import ScriptState


@pytest.fixture
def state() -> ScriptState:
    """Of a worker that has computed step 3 of rank 0."""
    state = ScriptState(nn.Linear(1, 1), {"seen": 0})
    state.begin(RankStep(3, 0))
    state.values["seen"] = 3
    state.save(RankStep(3, 0))
    return state


def test_a_change_that_rank_0_left_behind_is_said_to_be_lost(
    state: ScriptState, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 went elsewhere between two steps: that is no fault of the script, and must not end the run."""
    logs.configure("info", "test")
    state.values["best"] = 0.5
    state.begin(RankStep(4, 1))
    assert state.values == {"seen": 3}
    assert "is lost" in capsys.readouterr().err


def test_a_change_before_another_rank_of_the_same_step_is_refused(state: ScriptState) -> None:
    state.values["best"] = 0.5
    with pytest.raises(UsageError, match=r"before a batch of rank 1.*worker\.rank == 0"):
        state.begin(RankStep(3, 1))


def test_a_change_after_the_last_step_is_said_to_be_lost(
    state: ScriptState, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", "test")
    state.end()
    assert "is lost" not in capsys.readouterr().err
    state.values["best"] = 0.5
    state.end()
    assert "is lost" in capsys.readouterr().err


def test_what_is_no_dictionary_or_has_no_end_is_refused(state: ScriptState) -> None:
    with pytest.raises(UsageError, match=r"a list; give a dictionary"):
        ScriptState(nn.Linear(1, 1), [1])  # type: ignore[arg-type]
    state.values["self"] = state.values
    with pytest.raises(UsageError, match="holds itself"):
        state.save(RankStep(4, 0))


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ({"a": None}, r"metrics\['a'\]\): a NoneType"),
        ({"a": torch.tensor(1j)}, "a complex tensor"),
        ({"a": np.complex64(1)}, "a complex64"),
        ({"a": torch.zeros(2)}, r"a tensor of shape \(2,\)"),
        ({1: 1.0}, "give a dictionary from names to numbers"),
        ([1.0], "give a dictionary from names to numbers"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(metrics: Any, why: str) -> None:
    """Another thread reads them later, where an error would be of no use."""
    with pytest.raises(UsageError, match=why):
        as_reported(None, metrics)


def test_numbers_of_all_kinds_are_taken() -> None:
    metrics: Any = {"a": 1, "b": np.float32(2), "c": torch.ones(1, requires_grad=True), "d": True, "e": np.int64(3)}
    loss, said = as_reported(torch.ones((), requires_grad=True), metrics)
    assert isinstance(loss, torch.Tensor)
    assert not loss.requires_grad
    assert [float(each) for each in said.values()] == [1.0, 2.0, 1.0, 1.0, 3.0]


GIVEN: list[tuple[dict[str, Any], str]] = [
    ({"model": lambda x: x}, "model: a function; give an nn.Module"),
    ({"model": torch.jit.script(nn.Linear(1, 1))}, "before torch.jit makes one of it"),
    ({"steps": 12.0}, "steps=12.0: must be a whole number"),
    ({"steps": "12"}, "steps='12': must be a whole number"),
    ({"steps": -1}, "steps=-1: must be at least 0"),
    ({"seed": "x"}, "seed='x': must be a whole number"),
    ({"ranks": 0}, "ranks=0: must be at least 1"),
]


@pytest.mark.parametrize(("given", "why"), GIVEN, ids=[why.split(":")[0] for _, why in GIVEN])
def test_what_a_worker_can_not_take_is_named(given: dict[str, Any], why: str) -> None:
    arguments = {"model": nn.Linear(1, 1), "optimizer": psa.optim.SGD(lr=0.1)} | given
    with pytest.raises(UsageError, match=why):
        psa.Worker("job", **arguments)


def test_numbers_of_numpy_are_whole_numbers() -> None:
    assert type(whole_number("steps", np.int64(3))) is int
