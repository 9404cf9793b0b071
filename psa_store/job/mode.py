"""How updates and ranks wait for each other: the mode of a job, as data that is fixed when the job is created.

* ``sync``: a step is applied when the gradients of all ranks are in, so the result has the same bits whatever happens.
  ``backup=b`` applies it when those of all ranks but b are in, and drops the others (Chen et al., arXiv 1604.00981):
  which ranks count depends on which are fast, so the bits do, too. ``speculate`` lets a worker that waits compute the
  rank that is waited for; the first push counts, and both are equal, so the bits stay.
* ``async``: each push is applied when it arrives, and no rank waits for another.
* ``ssp:staleness=s``: the same, but no rank starts a step while another is more than ``s`` steps behind it (stale
  synchronous parallel; Ho et al., NIPS 2013). With ``s=0`` no rank could be ahead: that *is* ``sync``.
* ``local:steps=H``: each rank makes H steps of its own, with the job's optimizer, and pushes by how much it has moved
  away; the servers apply the mean of that with SGD and Nesterov momentum (DiLoCo; Douillard et al., arXiv 2311.08105),
  whose numbers are ``lr`` and ``momentum``. A version is such a *round*. ``fragments=F`` exchanges the shards in F
  parts, each after H steps but on different ones, so a round has H/F steps (streaming DiLoCo; arXiv 2501.18512). With
  ``overlap`` a rank goes on at once while the round is exchanged, from the global parameters of a round ago and its own
  last movement. The optimizer's state of a rank is kept with commits, so the bits are those of an undisturbed run;
  ``forget`` does not send and keep it: the next worker of a rank begins with new state, and a result cannot be repeated
  after a death.

Pure: no I/O, no threads, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from psa_store.errors import UsageError

_NUMBER_MAX = 1 << 20
_KNOWN = "sync, async, ssp:staleness=2, or local:steps=20"


class ModeName(StrEnum):
    SYNC = "sync"
    ASYNC = "async"
    SSP = "ssp"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Mode:
    """Use :func:`parse_mode`. ``str()`` gives a text back from which the same is read."""

    name: ModeName = ModeName.SYNC
    backup: int = 0
    """SYNC: of how many ranks a step does not wait for the gradients."""
    speculate: bool = False
    """SYNC: whether workers that wait compute ranks of others."""
    staleness: int = 0
    """SSP: by how many steps a rank may be ahead of the slowest."""
    steps: int = 1
    """LOCAL: steps of a rank between two exchanges of a shard."""
    fragments: int = 1
    overlap: bool = False
    forget: bool = False
    lr: float = 0.7
    momentum: float = 0.9

    @property
    def on_arrival(self) -> bool:
        """Whether a push is applied when it arrives, and not together with those of all other ranks."""
        return self.name is ModeName.ASYNC or self.staleness > 0

    @property
    def ahead_max(self) -> int | None:
        """By how many steps a rank may be ahead of the slowest; None for any number."""
        return None if self.name is ModeName.ASYNC else self.staleness

    @property
    def in_rounds(self) -> bool:
        """Whether ranks make steps of their own, and versions are rounds."""
        return self.name is ModeName.LOCAL

    @property
    def round_steps(self) -> int:
        """Steps of each rank from one version to the next."""
        return self.steps // self.fragments

    @property
    def by_value(self) -> bool:
        """Whether parameters are sent also within a host: workers go on computing while servers update."""
        return self.in_rounds or self.backup > 0 or self.speculate

    @property
    def may_miss_versions(self) -> bool:
        """Whether a step may be complete without the worker that holds a rank of it."""
        return self.backup > 0 or self.speculate

    def exchanges(self, shard: int, version: int) -> bool:
        """Whether the ranks push this trained shard for the version after ``version``."""
        return (shard - version) % self.fragments == 0

    def server_optimizer(self, optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
        """What servers apply to a job whose optimizer is this, both as ``psa.optim`` writes them."""
        if not self.in_rounds:
            return optimizer
        # The groups stand in the layout; here they have nothing of their own.
        groups = [{"select": each["select"], "lr_scale": 1.0} for each in optimizer.get("groups", ())]
        nesterov = self.momentum > 0.0
        return {"name": "SGD", "lr": self.lr, "momentum": self.momentum, "nesterov": nesterov, "groups": groups}

    def __str__(self) -> str:
        options = []
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name not in _OPTIONS[self.name]:
                continue
            if value == field.default and field.name != _REQUIRED.get(self.name):
                continue
            options.append(field.name if value is True else f"{field.name}={value}")
        return f"{self.name.value}:{','.join(options)}" if options else self.name.value


SYNC = Mode()


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= _NUMBER_MAX:
            raise ValueError(f"must be a whole number, at least {least}")
        return int(text)

    return read


def _real(below: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0.0 <= number < below:
            raise ValueError(f"must be a number from 0 to below {below:g}")
        return number

    return read


_FLAG = None
_OPTIONS: Mapping[ModeName, Mapping[str, Callable[[str], int | float] | None]] = {
    ModeName.SYNC: {"backup": _whole(0), "speculate": _FLAG},
    ModeName.ASYNC: {},
    ModeName.SSP: {"staleness": _whole(0)},
    ModeName.LOCAL: {
        "steps": _whole(1),
        "fragments": _whole(1),
        "overlap": _FLAG,
        "forget": _FLAG,
        "lr": _real(100.0),
        "momentum": _real(1.0),
    },
}
_REQUIRED = {ModeName.SSP: "staleness", ModeName.LOCAL: "steps"}


def parse_mode(text: str) -> Mode:
    """Read a mode from text such as ``ssp:staleness=2`` or ``local:steps=20,overlap``.

    Raises:
        UsageError: it is none; names what is known.
    """
    name, _, rest = text.partition(":")
    try:
        known = ModeName(name)
    except ValueError as error:
        raise UsageError(f"mode {text!r}: there is no {name!r}; use {_KNOWN}") from error
    options = _OPTIONS[known]
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in options or key in given:
            takes = ", ".join(options) or "no options"
            raise UsageError(f"mode {text!r}: {key!r} is not known here, or given twice; {name} takes {takes}")
        read = options[key]
        if (read is _FLAG) == bool(equals):
            raise UsageError(f"mode {text!r}: {key} {'takes no value' if read is _FLAG else 'needs a value'}")
        try:
            given[key] = True if read is _FLAG else read(value)
        except ValueError as error:
            raise UsageError(f"mode {text!r}: {key} {error}") from error
    required = _REQUIRED.get(known)
    if required is not None and required not in given:
        raise UsageError(f"mode {text!r}: give {name} its {required}, as in {_KNOWN}")
    mode = Mode(known, **given)
    if mode.steps % mode.fragments:
        raise UsageError(f"mode {text!r}: steps={mode.steps} cannot be shared out evenly to {mode.fragments} fragments")
    if mode.backup and mode.speculate:
        raise UsageError(f"mode {text!r}: a step that does not wait for slow ranks needs no speculation")
    return mode
