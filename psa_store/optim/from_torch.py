"""``torch.optim`` objects, taken as what they say: the class, its numbers, and its groups by parameter.

The object is read once and never stepped: servers apply the update. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NoReturn

import torch
from torch import nn

from psa_store.errors import UsageError
from psa_store.optim.from_scheduler import Rates
from psa_store.optim.spec import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Group,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    group,
)

_CLASSES: Mapping[type[torch.optim.Optimizer], type[Optimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.Adagrad: Adagrad,
    torch.optim.RMSprop: RMSprop,
    torch.optim.NAdam: NAdam,
    torch.optim.RAdam: RAdam,
    torch.optim.Adamax: Adamax,
    torch.optim.Adadelta: Adadelta,
}
_WHY_NOT = {
    "LBFGS": "it computes the loss several times a step",
    "SparseAdam": "servers have dense gradients: use nn.Embedding without sparse=True",
    "Muon": "it works on whole matrices, and a shard is a slice",
    "Adafactor": "it keeps means of rows and columns, and a shard is a slice",
    "ASGD": "it averages parameters within the optimizer",
    "Rprop": "it is for gradients of the whole data set, not of batches",
    "Lion": "write psa.optim.Lion(lr=…, betas=…, weight_decay=…)",
}
"""By name, as not every release of torch has each of them."""
_HOW_FAST = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Options that say how torch computes, not what."""
_PARAMETERS = "number of parameters"
_SET_BEFORE = "Set it before psa.Worker is made"
_INSTEAD = {
    "lr": "For a rate that changes with the step write psa.Worker(…, optimizer=…, lr_scheduler=…), or psa.optim with a "
    "schedule, such as psa.optim.warmup_cosine; for one that depends on results write worker.change(lr=…)",
    "weight_decay": "Write worker.change(weight_decay=…)",
}
"""What to write instead of a change in the loop."""


def from_torch(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Rates | None = None) -> Optimizer:
    """Return what servers apply instead of this optimizer.

    Args:
        rates: those of its groups at every step; None: they stay what they are.

    Raises:
        UsageError: another class, an option that servers do not know, an optimizer that has made steps, or parameters
            that do not fit those that ``model`` trains. The message says what to write.
    """
    name = type(optimizer).__name__
    kind = _class(optimizer)
    if any(float(state.get("step", 1)) > 0 for state in optimizer.state.values()):
        raise UsageError(f"optimizer={name}: it has made steps already, and servers would begin without its state")
    names = _names(optimizer, model)
    options = [_options(name, optimizer.defaults.keys(), each) for each in optimizer.param_groups]
    if kind in (Adam, AdamW):
        decoupled = [each.pop("decoupled_weight_decay", False) for each in options]
        if len(set(decoupled)) > 1:
            _refuse_difference(name, "decoupled_weight_decay")
        kind = AdamW if kind is AdamW or decoupled[0] else Adam
    rates = rates or constant_rates(optimizer)
    base = options[max(range(len(options)), key=lambda index: rates.scales[index])]
    groups: list[Group] = []
    for own, scale, selected in zip(options, rates.scales, names, strict=True):
        overrides = {key: value for key, value in own.items() if value != base[key]}
        if scale != 1.0:
            overrides["lr_scale"] = scale
        for key in overrides.keys() - kind.overridable:
            _refuse_difference(name, key)
        if overrides and selected:
            groups.append(group(selected, **overrides))
    return kind(rates.lr, **base, groups=groups)


def constant_rates(optimizer: torch.optim.Optimizer) -> Rates:
    """The rates of an optimizer without a scheduler."""
    rates = [float(each["lr"]) for each in optimizer.param_groups]
    largest = max(rates)  # others are a part of it, and no number is divided by zero
    return Rates(largest, [1.0 if rate == largest else rate / largest for rate in rates])


def numbers_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """By group, what would be a change if it were another one later; not what others have noted in the groups."""
    return [
        {_PARAMETERS: len(each["params"]), **{key: _number(each[key]) for key in optimizer.defaults}}
        for each in optimizer.param_groups
    ]


def _number(value: Any) -> Any:
    """A rate may be a tensor, which changes in place."""
    return float(value) if isinstance(value, torch.Tensor) else value


def refuse_change(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> NoReturn:
    """Name what differs between two :func:`numbers_of`, and say what to write."""
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        for key in sorted(old.keys() | new.keys(), key=lambda key: (key != "lr", key)):
            if old.get(key) != new.get(key):
                raise UsageError(
                    f"{key} of the optimizer's group {index} was changed from {old.get(key)!r} to {new.get(key)!r}: "
                    f"servers have read it when psa.Worker was made. {_INSTEAD.get(key, _SET_BEFORE)}"
                )
    count = f"{len(before)} groups of parameters when psa.Worker was made, now {len(after)}"
    raise UsageError(f"the optimizer had {count}. {_SET_BEFORE}")


def _class(optimizer: torch.optim.Optimizer) -> type[Optimizer]:
    kind = _CLASSES.get(type(optimizer))
    if kind is not None:
        return kind
    name = type(optimizer).__name__
    known = ", ".join(f"torch.optim.{each.__name__}" for each in _CLASSES)
    of = next((each.__name__ for each in type(optimizer).__mro__ if each in _CLASSES), None)
    why = f"it is not torch.optim.{of} but a class made from it" if of else _WHY_NOT.get(name, "servers do not know it")
    raise UsageError(f"optimizer={name}: {why}. Servers know {known}, and psa.optim.Lion")


def _refuse_difference(name: str, option: str) -> NoReturn:
    raise UsageError(f"optimizer={name}: its groups differ in {option}, which servers know one of for a job")


def _options(name: str, known: AbstractSet[str], param_group: Mapping[str, Any]) -> dict[str, Any]:
    """``known``: to the class; a group may have notes of schedulers and of the script as well."""
    if param_group.get("differentiable"):
        raise UsageError(f"optimizer={name}: differentiable=True is nothing that servers can do")
    return {key: _number(param_group[key]) for key in known - _HOW_FAST - {"lr"}}


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """By group, the names of its parameters in the model."""
    name_of = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    names: list[list[str]] = []
    for each in optimizer.param_groups:
        for parameter in each["params"]:
            if id(parameter) not in name_of:
                raise UsageError(
                    f"optimizer: it has a parameter of shape {tuple(parameter.shape)} that is none of the model's: "
                    "give psa.Worker a module that has all of them, and make the optimizer after the model is on its "
                    "device"
                )
        names.append([name_of[id(parameter)] for parameter in each["params"]])
    given = {name for some in names for name in some}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in given:
            raise UsageError(
                f"optimizer: it does not have {name}, which the model trains: give it to the optimizer, or set its "
                "requires_grad to False"
            )
    return names
