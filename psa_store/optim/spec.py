"""Optimizers as data: an allow-listed name, numbers, and groups of parameters for which some numbers differ.

Names and defaults are those of ``torch.optim``, and of its paper for :class:`Lion`. Everything is checked when it is
built, so an :class:`Optimizer` that exists can be applied. Everything after ``lr`` is keyword-only.

Pure, and without torch: workers, servers and the CLI may all use it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from psa_store.errors import DataIntegrity, UsageError
from psa_store.optim.checks import checked
from psa_store.optim.schedule import Schedule
from psa_store.optim.schedules import schedule_from_dict

EPS_MIN = 2.0**-126
"""The smallest normal float32. With a smaller ``eps``, an element that never had a gradient (padding between
tensors is such) would become 0/0."""

_LOWEST: Mapping[str, float] = {
    "alpha": 0.0,
    "dampening": float("-inf"),
    "eps": EPS_MIN,
    "initial_accumulator_value": 0.0,
    "lr_decay": 0.0,
    "lr_scale": 0.0,
    "momentum": 0.0,
    "momentum_decay": 0.0,
    "rho": 0.0,
    "weight_decay": 0.0,
}

_LATER: Mapping[str, object] = {"amsgrad": False, "maximize": False}
"""Options that came when jobs were stored already, and what those jobs do: with that value they are not written, so
that the document of an optimizer is the one it was."""


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters for which some numbers differ from the rest; built by :func:`group`."""

    select: str | tuple[str, ...]
    overrides: tuple[tuple[str, float | tuple[float, ...]], ...]

    def matches(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a parameter belongs to this group, if no earlier group has taken it."""
        if isinstance(self.select, tuple):
            return name in self.select
        if self.select == "matrices":
            return len(shape) >= 2
        if self.select == "vectors":
            return len(shape) < 2
        return fnmatch.fnmatchcase(name, self.select)

    def to_dict(self) -> dict[str, Any]:
        return {"select": _plain(self.select), **{name: _plain(value) for name, value in self.overrides}}


def group(select: str | Sequence[str], **overrides: float | Sequence[float]) -> Group:
    """Give some parameters their own numbers.

    Args:
        select: ``"matrices"`` (two or more dimensions), ``"vectors"`` (fewer), a glob over parameter names, or a list
            of names.
        overrides: ``lr_scale``, which multiplies the learning rate, and numbers of the optimizer such as
            ``weight_decay``.

    Raises:
        UsageError: an empty selection, no overrides, or a value that cannot be used.
    """
    if not select or not all(isinstance(each, str) for each in select):
        raise UsageError(
            f"select={select!r}: must be 'matrices', 'vectors', a glob such as '*.bias', or a list of names"
        )
    select = select if isinstance(select, str) else tuple(select)
    if not overrides:
        raise UsageError(f"group({select!r}): overrides nothing; give it lr_scale=, weight_decay=, … or leave it out")
    for name in overrides:
        if name not in _LOWEST and name != "betas":
            raise UsageError(f"group({select!r}): {name!r} is not a number that a group can override")
    checked_overrides = {
        name: _betas(value) if name == "betas" else checked(name, value, _LOWEST[name])
        for name, value in overrides.items()
    }
    return Group(select, tuple(sorted(checked_overrides.items())))


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What all optimizers have in common. Use one of the subclasses.

    ``lr``: a number or a :class:`Schedule`. ``clip_grad_norm``: largest norm of all gradients together,
    ``None`` for no limit. ``groups``: the first group that matches a parameter wins; the rest belong to group
    0. ``maximize``: climb instead of descend.
    """

    lr: float | Schedule = 1e-3
    weight_decay: float = field(default=0.0, kw_only=True)
    clip_grad_norm: float | None = field(default=None, kw_only=True)
    groups: Sequence[Group] = field(default=(), kw_only=True)
    maximize: bool = field(default=False, kw_only=True)

    overridable: ClassVar[frozenset[str]] = frozenset({"lr_scale", "weight_decay"})
    """What a group may override: numbers only, as what decides *how* an update is computed is one for all."""

    def __post_init__(self) -> None:
        if type(self) not in _BY_NAME.values():
            raise UsageError(f"{type(self).__name__} is not an optimizer; known: {', '.join(_BY_NAME)}")
        self._set("lr", self.lr if isinstance(self.lr, Schedule) else checked("lr", self.lr))
        if self.clip_grad_norm is not None:
            self._set("clip_grad_norm", checked("clip_grad_norm", self.clip_grad_norm))
            if self.clip_grad_norm == 0.0:
                raise UsageError("clip_grad_norm=0: would stop training; use None for no limit")
        for f in fields(self):
            if f.name in _LOWEST:
                self._set(f.name, checked(f.name, getattr(self, f.name), _LOWEST[f.name]))
            elif isinstance(f.default, bool) and not isinstance(getattr(self, f.name), bool):
                raise UsageError(f"{f.name}={getattr(self, f.name)!r}: must be True or False")
        self._check()
        self._check_groups()

    def _check(self) -> None:
        """What a subclass demands beyond the lower bounds of its numbers."""

    def _check_groups(self) -> None:
        self._set("groups", tuple(self.groups))
        for index, entry in enumerate(self.groups, start=1):
            if not isinstance(entry, Group):
                raise UsageError(f"groups: entry {index} is {entry!r}; build it with psa.optim.group(…)")
            for name, _ in entry.overrides:
                if name not in self.overridable:
                    known = ", ".join(sorted(self.overridable))
                    raise UsageError(f"groups: {type(self).__name__} cannot override {name!r}; it can: {known}")
            self.in_group(index)  # raises where the override does not go with the other arguments

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def group_of(self, name: str, shape: Sequence[int]) -> int:
        """The group of a parameter: 1 for the first of ``groups``, and so on; 0 if none matches."""
        return next((i for i, entry in enumerate(self.groups, start=1) if entry.matches(name, shape)), 0)

    def in_group(self, index: int) -> Self:
        """This optimizer with the overrides of one group put in, and without groups."""
        overrides: dict[str, Any] = dict(self.groups[index - 1].overrides) if index else {}
        overrides.pop("lr_scale", None)
        return replace(self, groups=(), **overrides)

    def lr_at(self, step: int, group: int = 0) -> float:
        """The learning rate of ``step``, counted from 0, for the parameters of a group."""
        lr = self.lr.at(step) if isinstance(self.lr, Schedule) else self.lr
        return lr * self.lr_scale(group)

    def lr_scale(self, group: int) -> float:
        """What multiplies the learning rate for the parameters of a group."""
        scale = dict(self.groups[group - 1].overrides).get("lr_scale", 1.0) if group else 1.0
        assert isinstance(scale, float)
        return scale

    def to_dict(self) -> dict[str, Any]:
        """A JSON object from which :func:`from_dict` builds an equal optimizer."""
        document: dict[str, Any] = {"name": type(self).__name__}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in _LATER or value != _LATER[f.name]:
                document[f.name] = _plain(value)
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if asked for."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    overridable: ClassVar[frozenset[str]] = frozenset({"lr_scale", "weight_decay", "momentum", "dampening"})

    def _check(self) -> None:
        if self.nesterov and (self.momentum == 0.0 or self.dampening != 0.0):
            raise UsageError("nesterov=True: needs a momentum greater than 0 and no dampening")


@dataclass(frozen=True, slots=True, kw_only=True)
class _WithBetas(Optimizer):
    """Two running means; ``betas``: how much of each stays from one update to the next."""

    betas: Sequence[float] = (0.9, 0.999)

    overridable: ClassVar[frozenset[str]] = frozenset({"lr_scale", "weight_decay", "eps", "betas"})

    def _check(self) -> None:
        self._set("betas", _betas(self.betas))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam(_WithBetas):
    """Adam; ``weight_decay`` is added to the gradient. ``amsgrad``: divide by the largest second moment so far."""

    eps: float = 1e-8
    amsgrad: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay."""

    weight_decay: float = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Adagrad(Optimizer):
    """Adagrad."""

    lr: float | Schedule = field(default=1e-2, kw_only=False)
    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    overridable: ClassVar[frozenset[str]] = frozenset({"lr_scale", "weight_decay", "lr_decay", "eps"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSprop(Optimizer):
    """RMSprop, with momentum and centering if asked for."""

    lr: float | Schedule = field(default=1e-2, kw_only=False)
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False

    overridable: ClassVar[frozenset[str]] = frozenset({"lr_scale", "weight_decay", "alpha", "eps", "momentum"})

    def _check(self) -> None:
        checked("alpha", self.alpha, 0.0, below=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NAdam(_WithBetas):
    """Adam with Nesterov momentum, which grows with the step at the pace of ``momentum_decay``.

    ``decoupled_weight_decay``: decay parameters as AdamW does, instead of adding to the gradient.
    """

    lr: float | Schedule = field(default=2e-3, kw_only=False)
    eps: float = 1e-8
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False

    overridable: ClassVar[frozenset[str]] = frozenset({"lr_scale", "weight_decay", "eps", "betas", "momentum_decay"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RAdam(_WithBetas):
    """Adam with a rectified variance. ``decoupled_weight_decay``: as in :class:`NAdam`."""

    eps: float = 1e-8
    decoupled_weight_decay: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adamax(_WithBetas):
    """Adam with the largest gradient of late in place of the second moment."""

    lr: float | Schedule = field(default=2e-3, kw_only=False)
    eps: float = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Adadelta(Optimizer):
    """Adadelta; ``rho``: how much of its running means stays from one update to the next."""

    lr: float | Schedule = field(default=1.0, kw_only=False)
    rho: float = 0.9
    eps: float = 1e-6

    overridable: ClassVar[frozenset[str]] = frozenset({"lr_scale", "weight_decay", "rho", "eps"})

    def _check(self) -> None:
        checked("rho", self.rho, 0.0, below=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lion(_WithBetas):
    """Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2): moves by the sign only.

    ``weight_decay`` is decoupled. Rates are 3 to 10 times smaller than AdamW's, and decay is as many times larger.
    """

    lr: float | Schedule = field(default=1e-4, kw_only=False)
    betas: Sequence[float] = (0.9, 0.99)

    overridable: ClassVar[frozenset[str]] = frozenset({"lr_scale", "weight_decay", "betas"})


_BY_NAME: Mapping[str, type[Optimizer]] = {
    cls.__name__: cls for cls in (SGD, Adam, AdamW, Adagrad, RMSprop, NAdam, RAdam, Adamax, Adadelta, Lion)
}


def from_dict(document: Mapping[str, Any]) -> Optimizer:
    """Rebuild an optimizer from :meth:`Optimizer.to_dict`.

    Raises:
        DataIntegrity: an unknown optimizer, an unknown member, or a value that cannot be used.
    """
    try:
        arguments = dict(document)
        cls = _BY_NAME[arguments.pop("name")]
        if isinstance(arguments.get("lr"), Mapping):
            arguments["lr"] = schedule_from_dict(arguments["lr"])
        arguments["groups"] = [group(**entry) for entry in arguments.get("groups", ())]
        return cls(**arguments)
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise DataIntegrity(f"the stored optimizer {document!r} cannot be read: {error!r}") from error


def _plain(value: object) -> object:
    """As JSON gives it back, so that a stored document equals the one it was written from."""
    if isinstance(value, Schedule | Group):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _betas(value: object) -> tuple[float, ...]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise UsageError(f"betas={value!r}: must be two numbers")
    return tuple(checked("betas", beta, 0.0, below=1.0) for beta in value)
