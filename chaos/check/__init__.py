"""The promises, each as a pure function over the journals of a run. `judge` asks them all."""

from __future__ import annotations

from dataclasses import dataclass

from chaos.check import bits, durability, exactly_once, fencing, fired, observed, trends
from chaos.check.recovery import Recovery, Steps, goodput, recoveries, steps_of
from chaos.check.violation import Violation
from chaos.journal import Journal, Truth

CHECKS = {
    "exactly_once": exactly_once.check,
    "bits": bits.check,
    "fencing": fencing.check,
    "durability": durability.check,
    "fired": fired.check,
    "observed": observed.check,
    "trends": trends.check,
}

__all__ = ["CHECKS", "Recovery", "Steps", "Verdict", "Violation", "judge"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said of a run."""

    violations: tuple[Violation, ...]
    recoveries: tuple[Recovery, ...]
    goodput: float
    """Useful step time / wall time, from the first step to the last."""
    normal_step_s: float
    wall_s: float


def judge(journal: Journal, known: Truth) -> Verdict:
    """Look for broken promises, and measure."""
    steps = steps_of(journal)
    found = [violation for check in CHECKS.values() for violation in check(journal, known)]
    return Verdict(
        violations=tuple(found),
        recoveries=tuple(recoveries(journal, steps)),
        goodput=goodput(steps),
        normal_step_s=steps.normal_s,
        wall_s=steps.times[-1] - steps.times[0] if steps.times else 0.0,
    )
