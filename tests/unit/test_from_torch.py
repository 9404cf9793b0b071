"""torch.optim objects are taken as what they say, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from psa_store import optim
from psa_store.errors import UsageError
from psa_store.job.layout import make_layout
from psa_store.optim.from_torch import from_torch, numbers_of, refuse_change
from psa_store.optim.kernels import ShardKernel, init_slots, make_scratch
from psa_store.worker.flat_model import describe_model
from tests.unit.optimizers import Lion

STEPS = 50
Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.LayerNorm(50), nn.Linear(50, 1))


def groups_of(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    """Matrices with the optimizer's own numbers, vectors with others."""
    parameters = list(model.parameters())
    return [
        {"params": [each for each in parameters if each.dim() > 1]},
        {"params": [each for each in parameters if each.dim() < 2], **second},
    ]


TAKEN: dict[str, tuple[Make, dict[str, Any]]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), {"lr": 0.02}),
    "SGD, nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), {"weight_decay": 0.1}),
    "SGD, momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3), {"momentum": 0.5, "lr": 0.3}),
    "Adam": (lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1), {"eps": 1e-4}),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95)), {"weight_decay": 0.0, "lr": 1e-3}),
    "AdamW, fused": (lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True), {"weight_decay": 0.5}),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01), {"weight_decay": 0.1}),
    "Adam, amsgrad": (lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True), {"betas": (0.5, 0.9)}),
    "Adam, decoupled": (
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.3, decoupled_weight_decay=True),
        {"weight_decay": 0.1},
    ),
    "AdamW, amsgrad, maximize": (lambda p: torch.optim.AdamW(p, amsgrad=True, maximize=True), {"lr": 1e-2}),
    "SGD, maximize": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=True), {"weight_decay": 0.1}),
    "NAdam": (lambda p: torch.optim.NAdam(p, weight_decay=0.1), {"momentum_decay": 0.02, "lr": 1e-2}),
    "NAdam, decoupled": (
        lambda p: torch.optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True, maximize=True),
        {"betas": (0.95, 0.9)},
    ),
    "RAdam": (lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=0.1), {"betas": (0.8, 0.9)}),
    "RAdam, decoupled": (
        lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
        {"weight_decay": 0.0},
    ),
    "Adamax": (lambda p: torch.optim.Adamax(p, weight_decay=0.1, maximize=True), {"eps": 1e-4}),
    "Adadelta": (lambda p: torch.optim.Adadelta(p, weight_decay=0.1), {"rho": 0.5}),
    "Adagrad, maximize": (lambda p: torch.optim.Adagrad(p, maximize=True), {"lr_decay": 0.1}),
    "RMSprop, maximize": (lambda p: torch.optim.RMSprop(p, maximize=True), {"momentum": 0.5}),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True), {"alpha": 0.9}),
}


@pytest.mark.parametrize(("make", "second"), TAKEN.values(), ids=TAKEN.keys())
def test_servers_do_what_the_object_would_have_done(make: Make, second: dict[str, Any]) -> None:
    model = make_model()
    optimizer = make(groups_of(model, **second))
    spec = from_torch(optimizer, model)
    layout = make_layout(describe_model(model, spec.group_of), 4096)
    places = dict(model.named_parameters())

    def flat(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        shards = [torch.zeros(shard.numel) for shard in layout.shards]
        for shard, place in zip(layout.shards, shards, strict=True):
            for piece in shard.pieces:
                source = tensors[layout.tensors[piece.tensor].name].detach().flatten()
                place[piece.shard_start : piece.shard_start + piece.length] = source[
                    piece.tensor_start : piece.tensor_start + piece.length
                ]
        return shards

    ours = flat(places)
    kernels = [
        ShardKernel(spec, layout, shard, param, init_slots(spec, param, shard, layout))
        for shard, param in zip(layout.shards, ours, strict=True)
    ]
    draw = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        for parameter in places.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        gradients = flat({name: each.grad for name, each in places.items() if each.grad is not None})
        for kernel, gradient in zip(kernels, gradients, strict=True):
            kernel.apply([gradient], make_scratch(), step=step, opt_step=step, grad_scale=1.0)
        optimizer.step()
    for mine, theirs in zip(ours, flat(places), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_adam_with_decoupled_decay_is_adamw() -> None:
    model = make_model()
    torch_adam = torch.optim.Adam(model.parameters(), weight_decay=0.3, decoupled_weight_decay=True)
    assert from_torch(torch_adam, model) == optim.AdamW(weight_decay=0.3)


def test_a_stored_group_of_names_is_read_back() -> None:
    model = make_model()
    spec = from_torch(torch.optim.SGD(groups_of(model, lr=0.5), lr=1.0), model)
    assert optim.from_dict(spec.to_dict()) == spec
    assert json.loads(json.dumps(spec.to_dict())) == spec.to_dict()
    assert spec.group_of("0.bias", (50,)) == 1 and spec.group_of("0.weight", (50, 6)) == 0


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


class Own(torch.optim.SGD):
    """What it does differently cannot be known."""


REFUSED: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], str]] = {
    "class": (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS.*torch.optim.AdamW"),
    "subclass": (lambda m: Own(m.parameters(), lr=0.1), r"Own.*not torch\.optim\.SGD"),
    "SparseAdam": (lambda m: torch.optim.SparseAdam(m.parameters()), "SparseAdam.*without sparse=True"),
    "Muon": (lambda m: torch.optim.Muon([m[0].weight]), "Muon.*whole matrices"),
    "Adafactor": (lambda m: torch.optim.Adafactor(m.parameters()), "Adafactor.*rows and columns"),
    "ASGD": (lambda m: torch.optim.ASGD(m.parameters()), "ASGD.*averages"),
    "Rprop": (lambda m: torch.optim.Rprop(m.parameters()), "Rprop.*whole data set"),
    "a Lion of others": (lambda m: Lion(m.parameters()), r"Lion.*psa\.optim\.Lion\(lr="),
    "differentiable": (lambda m: torch.optim.Adam(m.parameters(), differentiable=True), "differentiable=True"),
    "maximize of a group": (lambda m: torch.optim.SGD(groups_of(m, maximize=True), lr=0.1), "differ in maximize"),
    "amsgrad of a group": (lambda m: torch.optim.Adam(groups_of(m, amsgrad=True)), "differ in amsgrad"),
    "decoupled decay of a group": (
        lambda m: torch.optim.Adam(groups_of(m, decoupled_weight_decay=True)),
        "differ in decoupled_weight_decay",
    ),
    "has made steps": (stepped, "made steps already"),
    "lacks one": (lambda m: torch.optim.SGD(list(m.parameters())[1:], lr=0.1), r"does not have 0\.weight"),
    "another model's": (lambda _: torch.optim.SGD(make_model().parameters(), lr=0.1), "none of the model's"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_servers_cannot_do_is_refused(make: Callable[[nn.Module], torch.optim.Optimizer], words: str) -> None:
    model = make_model()
    with pytest.raises(UsageError, match=words):
        from_torch(make(model), model)


def test_a_frozen_parameter_need_not_be_given() -> None:
    model = make_model()
    first = next(model.parameters()).requires_grad_(False)
    rest = [each for each in model.parameters() if each is not first]
    assert from_torch(torch.optim.SGD(rest, lr=0.1), model) == optim.SGD(0.1)


def test_a_later_change_names_what_differs() -> None:
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    before = numbers_of(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(UsageError, match=r"lr of the optimizer's group 0 .* from 0\.1 to 0\.05.*warmup_cosine"):
        refuse_change(before, numbers_of(optimizer))


def test_parameters_that_come_or_go_later_are_named() -> None:
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    before = numbers_of(optimizer)
    optimizer.param_groups[0]["params"].pop()
    assert numbers_of(optimizer) != before
    with pytest.raises(UsageError, match=r"number of parameters of the optimizer's group 0 was changed from \d to \d"):
        refuse_change(before, numbers_of(optimizer))
