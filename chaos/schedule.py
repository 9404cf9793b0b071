"""Which faults, when: drawn from a seed, before anything runs. The same seed gives the same plan. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chaos.faults import FAULTS, Fault

FIRST_S = (0.3, 2.0)
"""When the first fault of a short run happens, in seconds after the first step."""
NEXT_S = (1.0, 4.0)
"""How long after that a second one follows, in half of the short runs."""
REST_S = 4.0
"""How long a job goes on after its last fault at its usual pace; then it may hurry."""
JITTER = 0.5
"""In a long run the faults come every ``every_s``, each earlier or later by up to half of this share of it."""


@dataclass(frozen=True, slots=True)
class ScheduledFault:
    """One fault to come. What it injections is chosen by ``pick`` among those that live at that moment."""

    id: int
    kind: str
    at_s: float
    """Seconds after the first step of the job."""
    for_s: float
    """How long a state lasts that ends by itself: a pause, a cut, an outage."""
    pick: float
    """In [0, 1): which of the candidates."""
    number: int
    """A number whose meaning depends on the kind: the byte at which a reply is torn, the chunk to die after."""

    @property
    def fault(self) -> Fault:
        return FAULTS[self.kind]


def short_plan(kinds: Sequence[str], name: str, seed: int) -> list[ScheduledFault]:
    """One fault or two, for one row of the matrix; every kind in ``kinds`` comes first in some seeds."""
    rng = random.Random(f"{name}/{seed}")
    plan = [_draw(0, kinds[seed % len(kinds)], rng.uniform(*FIRST_S), rng)]
    if rng.random() < 0.5 and not plan[0].fault.at_start:
        plan.append(_draw(1, rng.choice(kinds), plan[0].at_s + plan[0].for_s + rng.uniform(*NEXT_S), rng))
    return plan


def long_plan(kinds: Sequence[str], name: str, seed: int, duration_s: float, every_s: float) -> list[ScheduledFault]:
    """A fault every ``every_s`` for ``duration_s``; no kind comes more often than others by chance alone."""
    rng = random.Random(f"{name}/{seed}")
    plan: list[ScheduledFault] = []
    round_: list[str] = []
    while (at_s := every_s * (len(plan) + 1)) < duration_s:
        if not round_:
            round_ = rng.sample(list(kinds), len(kinds))
        jitter_s = every_s * JITTER * (rng.random() - 0.5)
        plan.append(_draw(len(plan), round_.pop(), at_s + jitter_s, rng))
    return plan


def ends_s(plan: Sequence[ScheduledFault]) -> float:
    """When the last fault is over, in seconds after the first step."""
    return max((planned.at_s + planned.for_s for planned in plan), default=0.0)


def pace_s(plan: Sequence[ScheduledFault], steps: int, least_s: float) -> float:
    """How long a step must take at least, so that the job goes on for :data:`REST_S` after its last fault."""
    return max(least_s, (ends_s(plan) + REST_S) / steps)


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
