"""The fault schedule: which faults, and when, drawn from a seed before anything runs. Pure: one seed, one schedule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chaos.faults import FAULTS, FaultKind

FIRST_S = (0.3, 2.0)
"""When the first fault of a short run happens, in seconds after the first step."""
NEXT_S = (1.0, 4.0)
"""How long after that a second one follows, in half of the short runs."""
AT_ONCE_MAX = 4
"""How many faults may be under way at once, where they may overlap."""
AT_ONCE_S = 1.0
"""Within how long such faults begin: sooner than a job has recovered from the first one."""
REST_S = 4.0
"""How long a job goes on at its usual pace after its last fault."""
JITTER = 0.5
"""In a long run the faults come every ``every_s``, each earlier or later by up to half of this share of it."""


@dataclass(frozen=True, slots=True)
class ScheduledFault:
    """One fault to come. Its target is chosen by ``pick`` among the processes that live at that moment."""

    id: int
    kind: str
    at_s: float
    """Seconds after the first step of the job."""
    for_s: float
    """How long a state lasts that ends by itself: a pause, a cut, an outage."""
    pick: float
    """In [0, 1): selects one of the candidates."""
    number: int
    """A number whose meaning depends on the kind: the byte at which a reply is torn, the chunk to die after."""

    @property
    def traits(self) -> FaultKind:
        return FAULTS[self.kind]


def short_schedule(kinds: Sequence[str], name: str, seed: int) -> list[ScheduledFault]:
    """Draw one fault or two, for one row of the matrix; every kind in ``kinds`` comes first in some seeds."""
    rng = random.Random(f"{name}/{seed}")
    schedule = [_draw(0, kinds[seed % len(kinds)], rng.uniform(*FIRST_S), rng)]
    if rng.random() < 0.5 and not schedule[0].traits.at_start:
        schedule.append(_draw(1, rng.choice(kinds), schedule[0].at_s + schedule[0].for_s + rng.uniform(*NEXT_S), rng))
    return schedule


def crowded_schedule(kinds: Sequence[str], name: str, seed: int) -> list[ScheduledFault]:
    """Draw one to four faults, for four seeds in a row, that begin so soon one after the other that they overlap.

    No two of them take away the same: there is one Redis, and a ZooKeeper of three nodes bears the loss of one.
    """
    rng = random.Random(f"{name}/{seed}")
    first_s = rng.uniform(*FIRST_S)
    chosen: list[str] = []
    for kind in rng.sample(list(kinds), len(kinds)):
        if len(chosen) <= seed % AT_ONCE_MAX and not {_takes(kind)} & {_takes(each) for each in chosen}:
            chosen.append(kind)
    times_s = sorted(first_s + rng.uniform(0.0, AT_ONCE_S) for _ in chosen)
    return [_draw(number, kind, at_s, rng) for number, (kind, at_s) in enumerate(zip(chosen, times_s, strict=True))]


def _takes(kind: str) -> str:
    """What a fault takes away that may be gone once."""
    for what in ("redis", "functions", "-zk-"):
        if what in kind:
            return "redis" if what == "functions" else what
    return kind.partition("-")[2]


def long_schedule(
    kinds: Sequence[str], name: str, seed: int, duration_s: float, every_s: float
) -> list[ScheduledFault]:
    """Draw a fault every ``every_s`` for ``duration_s``, all kinds equally often."""
    rng = random.Random(f"{name}/{seed}")
    schedule: list[ScheduledFault] = []
    round_: list[str] = []
    while (at_s := every_s * (len(schedule) + 1)) < duration_s:
        if not round_:
            round_ = rng.sample(list(kinds), len(kinds))
        jitter_s = every_s * JITTER * (rng.random() - 0.5)
        schedule.append(_draw(len(schedule), round_.pop(), at_s + jitter_s, rng))
    return schedule


def ends_s(schedule: Sequence[ScheduledFault]) -> float:
    """Return when the last fault is over, in seconds after the first step."""
    return max((each.at_s + each.for_s for each in schedule), default=0.0)


def pace_s(schedule: Sequence[ScheduledFault], steps: int, least_s: float) -> float:
    """Return the least duration of a step with which the job goes on for :data:`REST_S` after its last fault."""
    return max(least_s, (ends_s(schedule) + REST_S) / steps)


def _draw(number: int, kind: str, at_s: float, rng: random.Random) -> ScheduledFault:
    fault = FAULTS[kind]
    return ScheduledFault(
        id=number,
        kind=kind,
        at_s=round(at_s, 3),
        for_s=round(rng.uniform(*fault.lasts_s), 3),
        pick=rng.random(),
        number=rng.randrange(*fault.numbers),
    )
