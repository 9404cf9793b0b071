"""torch's schedulers are read as the rates that they give, tick by tick, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from psa_store import optim
from psa_store.errors import UsageError
from psa_store.optim.from_scheduler import rates_of
from psa_store.optim.from_torch import from_torch

STEPS = 230
Make = Callable[[torch.optim.Optimizer], LRScheduler]


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))


def make_optimizer(model: torch.nn.Module, *rates: float) -> torch.optim.Optimizer:
    """One group a layer, each with a rate."""
    layers = [list(layer.parameters()) for layer in model.children()]
    if len(rates) == 1:
        return torch.optim.SGD(model.parameters(), lr=rates[0], momentum=0.9)
    groups = [{"params": layer, "lr": rate} for layer, rate in zip(layers, rates, strict=True)]
    return torch.optim.SGD(groups, momentum=0.9)


def hugging_face_cosine(step: int) -> float:
    """What transformers' schedule with warm-up gives a LambdaLR."""
    if step < 20:
        return step / 20
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - 20) / (STEPS - 20))))


class Annealer:
    """A script's own class: a method of it is a function of the step."""

    def __init__(self) -> None:
        self.model = self.forbid

    def __deepcopy__(self, memo: object) -> None:
        raise AssertionError("what the script has is not copied")

    def forbid(self) -> None: ...

    def rate(self, step: int) -> float:
        return 1.0 / (1.0 + step / 10)


READ: dict[str, Make] = {
    "ConstantLR": lambda o: ConstantLR(o, factor=0.5, total_iters=7),
    "LinearLR": lambda o: LinearLR(o, 0.1, 0.8, total_iters=50),
    "StepLR": lambda o: StepLR(o, 30, gamma=0.3),
    "MultiStepLR": lambda o: MultiStepLR(o, [30, 70, 70, 200], gamma=0.3),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.97),
    "PolynomialLR": lambda o: PolynomialLR(o, 100, power=1.7),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, STEPS),
    "CosineAnnealingLR, up again": lambda o: CosineAnnealingLR(o, 50),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 30),
    "CosineAnnealingWarmRestarts, longer": lambda o: CosineAnnealingWarmRestarts(o, 10, T_mult=2),
    "OneCycleLR": lambda o: OneCycleLR(o, [each["lr"] for each in o.param_groups], STEPS, cycle_momentum=False),
    "OneCycleLR, three phases": lambda o: OneCycleLR(
        o, [each["lr"] for each in o.param_groups], STEPS, three_phase=True, cycle_momentum=False
    ),
    "OneCycleLR, lines": lambda o: OneCycleLR(
        o, [each["lr"] for each in o.param_groups], STEPS, anneal_strategy="linear", cycle_momentum=False
    ),
    "CyclicLR": lambda o: CyclicLR(
        o,
        [each["lr"] / 10 for each in o.param_groups],
        [each["lr"] for each in o.param_groups],
        20,
        30,
        cycle_momentum=False,
    ),
    "CyclicLR, triangular2": lambda o: CyclicLR(
        o,
        [each["lr"] / 10 for each in o.param_groups],
        [each["lr"] for each in o.param_groups],
        20,
        mode="triangular2",
        cycle_momentum=False,
    ),
    "LambdaLR": lambda o: LambdaLR(o, hugging_face_cosine),
    "LambdaLR, a method": lambda o: LambdaLR(o, Annealer().rate),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda step: 0.99 if step < 100 else 1.0),
    "SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, 0.01, total_iters=20), CosineAnnealingLR(o, STEPS - 20)], milestones=[20]
    ),
    "ChainedScheduler": lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=20), ExponentialLR(o, 0.99)]),
}


@pytest.mark.parametrize("rates", [(0.1,), (0.03, 0.1)], ids=["one group", "two groups"])
@pytest.mark.parametrize("make", READ.values(), ids=READ.keys())
def test_a_scheduler_is_read_as_the_rates_that_it_gives(make: Make, rates: tuple[float, ...]) -> None:
    model = make_model()
    optimizer = make_optimizer(model, *rates)
    scheduler = make(optimizer)
    before = json.dumps(scheduler.state_dict(), default=str)
    spec = from_torch(optimizer, model, rates_of(scheduler, optimizer, STEPS))
    assert json.dumps(scheduler.state_dict(), default=str) == before, "the script's own object is left alone"

    stored = optim.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False)))
    assert len(json.dumps(spec.to_dict())) < 40_000
    for step in range(STEPS):
        for index, name in enumerate(("0.weight", "1.weight")):
            theirs = float(optimizer.param_groups[min(index, len(rates) - 1)]["lr"])
            ours = stored.lr_at(step, stored.group_of(name, (2, 2)))
            assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-12), (step, name)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "name", ["StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR, up again", "CosineAnnealingWarmRestarts"]
)
def test_what_has_a_rule_is_the_same_document_for_any_number_of_steps(name: str) -> None:
    model = make_model()
    documents = []
    for steps in (40, STEPS, 10**9, None):
        optimizer = make_optimizer(model, 0.1)
        scheduler = READ[name](optimizer)
        documents.append(from_torch(optimizer, model, rates_of(scheduler, optimizer, steps)).to_dict())
    assert all(document == documents[0] for document in documents)


def test_rates_that_come_to_rest_are_the_same_document_for_any_number_of_steps() -> None:
    documents = []
    for steps in (40, STEPS):
        optimizer = make_optimizer(make_model(), 0.1)
        scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
        documents.append(rates_of(scheduler, optimizer, steps))
    assert documents[0] == documents[1]


def test_a_scheduler_with_a_formula_is_stored_as_that() -> None:
    optimizer = make_optimizer(make_model(), 0.1)
    assert rates_of(StepLR(optimizer, 30), optimizer, STEPS).lr == optim.step_decay(0.1, every=30)


class Own(LRScheduler):
    def get_lr(self) -> list[Any]:
        return [0.1 for _ in self.base_lrs]


def ticked(optimizer: torch.optim.Optimizer) -> LRScheduler:
    scheduler = StepLR(optimizer, 10)
    optimizer.step()
    scheduler.step()
    return scheduler


REFUSED: dict[str, tuple[Callable[[torch.optim.Optimizer], object], str]] = {
    "by results": (ReduceLROnPlateau, "ReduceLROnPlateau.*depend on results"),
    "an own class": (Own, "Own.*none of torch's.*LambdaLR"),
    "no scheduler": (lambda _: 3, "int.*none of torch's"),
    "of another optimizer": (lambda _: StepLR(make_optimizer(make_model(), 0.1), 3), "another optimizer"),
    "ticked": (ticked, "ticked already"),
    "momentum": (lambda o: OneCycleLR(o, 0.1, STEPS), "changes the momentum.*cycle_momentum=False"),
    "too short": (lambda o: OneCycleLR(o, 0.1, STEPS - 1, cycle_momentum=False), "ends after 229 steps"),
    "without a rule": (
        lambda o: LambdaLR(o, lambda step: float(torch.rand((), generator=torch.Generator().manual_seed(step)))),
        r"no rule.*psa\.optim\.table",
    ),
    "less than 0": (lambda o: LambdaLR(o, lambda step: 1 - step / 10), "less than 0"),
    "own results in a chain": (
        lambda o: ChainedScheduler([StepLR(o, 10), Own(o)]),
        "Own.*none of torch's",
    ),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_servers_cannot_know_is_refused(make: Callable[[torch.optim.Optimizer], object], words: str) -> None:
    optimizer = make_optimizer(make_model(), 0.1)
    scheduler = make(optimizer)
    with pytest.raises(UsageError, match=words):
        rates_of(scheduler, optimizer, 9000 if "rule" in words else STEPS)


def test_groups_whose_rates_go_apart_are_refused() -> None:
    optimizer = make_optimizer(make_model(), 0.1, 0.2)
    scheduler = LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1.0])
    with pytest.raises(UsageError, match=r"groups 1 and 0 .* at step 1 "):
        rates_of(scheduler, optimizer, STEPS)


def test_rates_of_a_function_need_the_number_of_steps() -> None:
    optimizer = make_optimizer(make_model(), 0.1)
    with pytest.raises(UsageError, match="steps="):
        rates_of(LambdaLR(optimizer, hugging_face_cosine), optimizer, None)


def test_a_warm_up_from_zero_keeps_the_proportion_of_groups() -> None:
    model = make_model()
    optimizer = make_optimizer(model, 0.1, 0.025)
    spec = from_torch(optimizer, model, rates_of(LambdaLR(optimizer, hugging_face_cosine), optimizer, STEPS))
    assert spec.lr_at(0) == 0.0 and spec.lr_scale(spec.group_of("1.weight", (1, 4))) == 0.25
