"""Optimizers as data: what they are made of, as JSON, their groups and schedules, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from psa_store import optim
from psa_store.errors import DataIntegrity, UsageError
from tests.unit.optimizers import EVERY_OPTIMIZER

_TORCH = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta"]


@EVERY_OPTIMIZER
def test_json_gives_back_an_equal_optimizer(optimizer: optim.Optimizer) -> None:
    document = optimizer.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert optim.from_dict(json.loads(json.dumps(document))) == optimizer


def test_json_gives_back_schedules_groups_and_clipping() -> None:
    optimizer = optim.AdamW(
        optim.linear(0.1 + 0.2, total=10),
        betas=[0.9, 1 / 3],
        clip_grad_norm=1,
        groups=[optim.group("*.bias", weight_decay=0), optim.group("matrices", lr_scale=1 / 3)],
    )
    again = optim.from_dict(json.loads(json.dumps(optimizer.to_dict())))
    assert again == optimizer
    assert hash(again) == hash(optimizer)
    assert again.to_dict() == optimizer.to_dict()


@pytest.mark.parametrize("name", _TORCH)
def test_defaults_are_those_of_torch(name: str) -> None:
    theirs = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(1))]).defaults
    ours = getattr(optim, name)().to_dict()
    for key in ours.keys() - {"name", "clip_grad_norm", "groups"}:
        expected = list(theirs[key]) if key == "betas" else theirs[key]
        assert ours[key] == expected, key


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: optim.SGD(-1.0), "lr=-1"),
        (lambda: optim.SGD("fast"), "lr='fast'"),  # type: ignore[arg-type]
        (lambda: optim.SGD(True), "lr=True"),
        (lambda: optim.SGD(math.nan), "lr=nan"),
        (lambda: optim.SGD(0.1, momentum=-0.1), "momentum=-0.1"),
        (lambda: optim.SGD(0.1, nesterov=True), "nesterov=True"),
        (lambda: optim.SGD(0.1, nesterov=1), "nesterov=1"),  # type: ignore[arg-type]
        (lambda: optim.SGD(0.1, maximize=1), "maximize=1"),  # type: ignore[arg-type]
        (lambda: optim.AdamW(amsgrad=None), "amsgrad=None"),  # type: ignore[arg-type]
        (lambda: optim.NAdam(momentum_decay=-1), "momentum_decay=-1"),
        (lambda: optim.NAdam(decoupled_weight_decay="yes"), "decoupled_weight_decay='yes'"),  # type: ignore[arg-type]
        (lambda: optim.Adadelta(rho=1.0), "rho=1.0"),
        (lambda: optim.Lion(betas=(0.9, 0.99, 0.999)), "betas="),
        (lambda: optim.AdamW(groups=[optim.group("vectors", betas=0.9)]), "betas=0.9"),
        (lambda: optim.AdamW(groups=[optim.group("vectors", betas=(0.9, 1.0))]), "betas=1.0"),
        (lambda: optim.Lion(groups=[optim.group("vectors", eps=1e-3)]), "Lion cannot override 'eps'"),
        (lambda: optim.Adam(betas=(0.9, 1.0)), "betas=1.0"),
        (lambda: optim.Adam(betas=(0.9,)), "betas="),
        (lambda: optim.Adam(eps=0.0), "eps=0.0"),
        (lambda: optim.Adam(weight_decay=math.inf), "weight_decay=inf"),
        (lambda: optim.AdamW(clip_grad_norm=0), "clip_grad_norm=0"),
        (lambda: optim.AdamW(clip_grad_norm=-1), "clip_grad_norm=-1"),
        (lambda: optim.RMSprop(alpha=1.0), "alpha=1.0"),
        (lambda: optim.RMSprop(centered=None), "centered=None"),  # type: ignore[arg-type]
        (lambda: optim.Adagrad(lr_decay=-1), "lr_decay=-1"),
        (lambda: optim.Optimizer(0.1), "not an optimizer"),
        (lambda: optim.AdamW(groups=[{"select": "vectors"}]), "psa.optim.group"),  # type: ignore[list-item]
        (
            lambda: optim.AdamW(groups=[optim.group("vectors", momentum=0.9)]),
            "AdamW cannot override 'momentum'",
        ),
        (
            lambda: optim.SGD(0.1, momentum=0.9, nesterov=True, groups=[optim.group("*", momentum=0)]),
            "nesterov",
        ),
        (lambda: optim.group("vectors"), "overrides nothing"),
        (lambda: optim.group("", lr_scale=1.0), "select=''"),
        (lambda: optim.group("vectors", lr_scale=-1.0), "lr_scale=-1"),
        (lambda: optim.group("vectors", nesterov=True), "'nesterov'"),
        (lambda: optim.warmup_cosine(1e-3, warmup=100, total=100), "total=100"),
        (lambda: optim.warmup_cosine(1e-3, warmup=1.5), "warmup=1.5"),  # type: ignore[arg-type]
        (lambda: optim.constant(-1.0), "peak=-1"),
    ],
)
def test_unusable_arguments_are_refused_by_name(build: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        build()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Lion"},
        {"name": "Optimizer"},
        {"name": ["SGD"]},
        {"momentun": 0.9},
        {"momentum": "0.9"},
        {"lr": {"shape": "cubic", "peak": 1.0, "warmup": 0, "total": 1, "final": 1.0}},
        {"lr": {"shape": "cosine"}},
        {"groups": [{"weight_decay": 0.1}]},
        {"groups": [{"select": "vectors", "weight_decoy": 0.1}]},
        {"groups": 3},
    ],
)
def test_a_damaged_document_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(DataIntegrity, match="cannot be read"):
        optim.from_dict({**optim.SGD(0.1).to_dict(), **change})
    with pytest.raises(DataIntegrity):
        optim.from_dict({})


def test_options_that_came_later_are_written_only_where_they_change_something() -> None:
    assert optim.Adam(1e-3).to_dict() == {
        "name": "Adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "clip_grad_norm": None,
        "groups": [],
        "betas": [0.9, 0.999],
        "eps": 1e-8,
    }
    assert optim.Adam(amsgrad=True).to_dict()["amsgrad"] is True
    assert optim.SGD(maximize=True).to_dict()["maximize"] is True


def test_betas_of_a_group_are_stored() -> None:
    optimizer = optim.Lion(groups=[optim.group("vectors", betas=[0.5, 0.6], lr_scale=0.1)])
    assert optim.from_dict(json.loads(json.dumps(optimizer.to_dict()))) == optimizer
    assert optimizer.in_group(1).betas == (0.5, 0.6) and optimizer.in_group(0).betas == (0.9, 0.99)


def test_the_first_group_that_matches_wins() -> None:
    optimizer = optim.SGD(
        0.1,
        groups=[
            optim.group("head.*", lr_scale=0.1),
            optim.group("vectors", weight_decay=0.0),
            optim.group("*.Weight", weight_decay=0.1),
            optim.group("matrices", weight_decay=0.2),
        ],
    )
    assert optimizer.group_of("head.bias", (3,)) == 1
    assert optimizer.group_of("body.bias", (3,)) == 2
    assert optimizer.group_of("scale", ()) == 2
    assert optimizer.group_of("body.weight", (3, 3)) == 4, "names are compared with their case"
    assert optim.SGD(0.1, groups=[optim.group("a", lr_scale=2)]).group_of("b", (1,)) == 0
    assert optimizer.lr_at(0, 1) == pytest.approx(0.01)
    assert optimizer.in_group(4).weight_decay == 0.2
    assert optimizer.in_group(0).weight_decay == 0.0


def test_warmup_cosine_is_the_formula_of_nanogpt() -> None:
    peak, warmup, total, final = 1e-3, 100, 2000, 1e-4

    def nanogpt(it: int) -> float:
        if it < warmup:
            return peak * (it + 1) / (warmup + 1)
        if it > total:
            return final
        ratio = (it - warmup) / (total - warmup)
        return final + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - final)

    schedule = optim.warmup_cosine(peak)
    assert [schedule.at(step) for step in range(2100)] == pytest.approx(
        [nanogpt(step) for step in range(2100)], rel=1e-15
    )
    assert schedule.at(warmup) == peak
    assert schedule.at(10**9) == final


def test_linear_falls_on_a_straight_line() -> None:
    schedule = optim.linear(1.0, warmup=1, total=5, final=0.2)
    assert [schedule.at(step) for step in range(7)] == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_a_constant_schedule_is_the_number() -> None:
    assert {optim.constant(0.3).at(step) for step in (0, 1, 10**6)} == {0.3}
    assert optim.SGD(optim.constant(0.3)).lr_at(7) == optim.SGD(0.3).lr_at(7)
