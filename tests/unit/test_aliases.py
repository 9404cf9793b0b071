"""A parameter that shares memory with another tensor is refused: in flat memory each has a place of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from psa_store.errors import UsageError
from psa_store.worker.flat_model import describe_model


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))


def tie_data(model: nn.Sequential) -> None:
    model[1].weight.data = model[0].weight.data


def take_a_row(model: nn.Sequential) -> None:
    model[1].bias.data = model.get_parameter("0.weight").data[2]


def tie_frozen(model: nn.Sequential) -> None:
    model[1].weight.requires_grad_(False).data = model[0].weight.data


def show_in_buffer(model: nn.Sequential) -> None:
    model.register_buffer("shown", model.get_parameter("0.weight").detach())


def expand(model: nn.Sequential) -> None:
    model[1].bias = nn.Parameter(torch.zeros(1).expand(4))


def leave_lazy(model: nn.Sequential) -> None:
    model.append(nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (tie_data, r"0\.weight and 1\.weight share memory.*a\.weight = b\.weight"),
        (take_a_row, r"0\.weight and 1\.bias share memory"),
        (tie_frozen, r"0\.weight and 1\.weight share memory"),
        (show_in_buffer, r"0\.weight and shown share memory"),
        (expand, r"1\.bias has several elements in one place"),
        (leave_lazy, r"3\.weight has no shape yet"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_memory_that_is_shared_is_refused(change: Callable[[nn.Sequential], None], why: str) -> None:
    model = make()
    change(model)
    with pytest.raises(UsageError, match=why):
        describe_model(model, lambda _name, _shape: 0)


def tie(model: nn.Sequential) -> None:
    model[1].weight = model[0].weight


def take_columns(model: nn.Sequential) -> None:
    both = torch.randn(4, 8)
    model[0].weight, model[1].weight = (nn.Parameter(each) for each in both.chunk(2, dim=1))


def share_constants(model: nn.Sequential) -> None:
    mask = torch.ones(8)
    model[0].register_buffer("mask", mask)
    model[1].register_buffer("mask", mask[:4])


@pytest.mark.parametrize("change", [tie, take_columns, share_constants], ids=lambda each: each.__name__)
def test_what_has_elements_of_its_own_is_taken(change: Callable[[nn.Sequential], None]) -> None:
    model = make()
    change(model)
    assert describe_model(model, lambda _name, _shape: 0)
