"""The promises, each as a pure function over the journals of a run. `check_history` checks them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chaos.check import arrival, bits, durability, exactly_once, fencing, fired, lease, observed, trends
from chaos.check.recovery import Recovery, Steps, goodput, recoveries, steps_of
from chaos.check.violation import Violation
from chaos.history import History, Reference, mode_of

Check = Callable[[History, Reference], list[Violation]]
CHECKS: dict[str, Check] = {
    "exactly_once": exactly_once.check,
    "bits": bits.check,
    "fencing": fencing.check,
    "durability": durability.check,
    "lease": lease.check,
    "fired": fired.check,
    "observed": observed.check,
    "trends": trends.check,
}

ON_ARRIVAL: dict[str, Check] = {
    **CHECKS,
    "exactly_once": lambda history, _: arrival.check_arrivals(history),
    "bits": bits.finished,
}
"""The same where pushes are applied on arrival."""

__all__ = ["CHECKS", "Recovery", "Steps", "Verdict", "Violation", "check_history"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of checking a run."""

    violations: tuple[Violation, ...]
    recoveries: tuple[Recovery, ...]
    goodput: float
    """Useful step time / wall time, from the first step to the last."""
    normal_step_s: float
    wall_s: float


def check_history(history: History, reference: Reference) -> Verdict:
    """Find broken promises, and measure recoveries and goodput."""
    steps = steps_of(history)
    checks = ON_ARRIVAL if mode_of(history).on_arrival else CHECKS
    found = [violation for check in checks.values() for violation in check(history, reference)]
    return Verdict(
        violations=tuple(found),
        recoveries=tuple(recoveries(history, steps)),
        goodput=goodput(steps),
        normal_step_s=steps.normal_s,
        wall_s=steps.times[-1] - steps.times[0] if steps.times else 0.0,
    )
