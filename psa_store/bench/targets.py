"""How fast psa wants to be, as ratios to others: for 100 MB of parameters, SGD, and 2 or 4 workers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from psa_store.bench.names import FLOOR, GLOO, PSA, PSA_TCP, RAY, RPC
from psa_store.bench.request import Rule
from psa_store.bench.results import Match

_BYTES = 100_000_000
_TARGETS = {
    (PSA, GLOO): {2: 0.4, 4: 0.25},
    (PSA, RPC): {2: 0.3, 4: 0.12},
    (PSA, RAY): {2: 0.1, 4: 0.15},
    (PSA, FLOOR): {2: 1.6, 4: 1.5},
    (PSA_TCP, RPC): {2: 1.1, 4: 0.7},
}


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that should not be exceeded, and what it was."""

    above: str
    below: str
    at_most: float
    found: float

    @property
    def met(self) -> bool:
        return self.found <= self.at_most


def targets(match: Match) -> list[Target]:
    """The targets that a match can be held against; none for other workloads than the one they are meant for."""
    workload = match.workload
    if workload.size_bytes != _BYTES or workload.rule is not Rule.SGD or workload.clip is not None:
        return []
    found = []
    for (above, below), at_most in _TARGETS.items():
        one, other = match.find(above), match.find(below)
        if one and other and workload.workers in at_most:
            ratio = match.ratio(one, other).median
            found.append(Target(above, below, at_most[workload.workers], ratio))
    return found
