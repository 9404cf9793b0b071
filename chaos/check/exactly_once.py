"""A: every acknowledged gradient is in the final history once, every other one at most once.

A version of the final history was made by one term. Each of its servers must have applied it once, with the gradient
of every rank in every one of its shards once; and what it applied must be what a worker computed: fingerprints of
gradients are additive, so those of all servers add up to that of the worker.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from chaos.check.lineage import Term, makers, terms
from chaos.check.violation import Violation
from chaos.history import History, Reference

_NAME = "exactly_once"
_MODULUS = 1 << 64


def check(history: History, _reference: Reference) -> list[Violation]:
    """See the module."""
    if not history.of("scenario"):
        return []
    steps, ranks = history.scenario["steps"], history.scenario["ranks"]
    found = terms(history)
    pushed: dict[tuple[int, int], set[str]] = defaultdict(set)
    for event in history.of("pushed"):
        pushed[event["step"], event["rank"]].add(event["sum"])
    computed = {(event["step"], event["rank"]) for event in history.of("computing")}
    violations = [
        Violation(_NAME, f"step {step}, rank {rank}: computed differently by different workers: {sorted(sums)}")
        for (step, rank), sums in pushed.items()
        if len(sums) > 1
    ]
    violations += _applied_twice(history)
    violations += _acknowledged(history, {term.number: term for term in found})
    made_by = makers(found, steps)
    for version in range(1, steps + 1):
        if version not in made_by:
            violations.append(Violation(_NAME, f"no term made version {version}"))
            continue
        violations += _version(made_by[version], version, ranks, pushed, computed)
    return violations


def _version(
    term: Term, version: int, ranks: int, pushed: dict[tuple[int, int], set[str]], computed: set[tuple[int, int]]
) -> list[Violation]:
    """One version of the final history."""
    events = term.applied.get(version, [])
    where = f"version {version} of term {term.number}"
    if {event.name for event in events} != set(term.serving):
        names = sorted(event.name for event in events)
        return [Violation(_NAME, f"{where} was applied by {names}, but its servers are {sorted(term.serving)}")]
    if all(event.event == "skipped" for event in events):
        return []
    violations = []
    for rank in range(ranks):
        total = 0
        for event in events:
            shards = len(term.serving[event.name]["trained"])
            counted = event["ranks"].get(str(rank), 0) if event.event == "applied" else 0
            if counted != shards:
                text = f"{where}: rank {rank} counts in {counted} of {shards} shards of {event.name}"
                violations.append(Violation(_NAME, text, event.t))
            total += int(event["sums"].get(str(rank), "0"), 16) if event.event == "applied" else 0
        sums = pushed.get((version - 1, rank))
        if sums and f"{total % _MODULUS:016x}" not in sums:
            text = (
                f"{where}: what was applied for rank {rank} is not what was pushed: once, twice, or from another step"
            )
            violations.append(Violation(_NAME, text, events[0].t))
        if (version - 1, rank) not in computed:
            violations.append(Violation(_NAME, f"{where}: no worker computed rank {rank} of step {version - 1}"))
    return violations


def _applied_twice(history: History) -> list[Violation]:
    times = Counter((event.name, event["term"], event["version"]) for event in history.of("applied"))
    return [
        Violation(_NAME, f"server {name} applied version {version} {count} times in term {term}")
        for (name, term, version), count in times.items()
        if count > 1
    ]


def _acknowledged(history: History, by_number: dict[int, Term]) -> list[Violation]:
    """A worker was told of a version only after every server of the term had applied it."""
    violations = []
    for event in history.of("acked"):
        term = by_number.get(event["term"])
        applied = {} if term is None else {each.name: each.t for each in term.applied.get(event["version"], [])}
        late = [] if term is None else [name for name in term.serving if applied.get(name, event.t + 1) > event.t]
        if term is None or late:
            text = f"version {event['version']} of term {event['term']} was acknowledged before {late} applied it"
            violations.append(Violation(_NAME, text, event.t))
    return violations
