"""A: every acknowledged gradient is in the final history once, every other one at most once.

A version of the final history was made by one term. Each of its servers must have applied it once, with the gradient
of every cell in every one of its shards once; and what it applied must be what a worker computed: fingerprints of
gradients are additive, so those of all servers add up to that of the worker. A cell is a stage of a rank; a model in
one piece is one stage.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from chaos.check.lineage import Term, makers, terms
from chaos.check.violation import Violation
from chaos.history import Event, History, Reference

_NAME = "exactly_once"
_MODULUS = 1 << 64
_Cell = tuple[int, int]


def check(history: History, _reference: Reference) -> list[Violation]:
    """See the module."""
    if not history.of("scenario"):
        return []
    facts = history.scenario
    steps, cells = facts["steps"], list(itertools.product(range(facts["ranks"]), range(facts["stages"])))
    found = terms(history)
    pushed: dict[tuple[int, _Cell], set[str]] = defaultdict(set)
    for event in history.of("pushed"):
        pushed[event["step"], _cell(event)].add(event["sum"])
    computed = {(event["step"], _cell(event)) for event in history.of("computing")}
    violations = [
        Violation(_NAME, f"step {step}, {_named(cell)}: computed differently by different workers: {sorted(sums)}")
        for (step, cell), sums in pushed.items()
        if len(sums) > 1
    ]
    violations += _applied_twice(history)
    violations += _acknowledged(history, {term.number: term for term in found})
    made_by = makers(found, steps)
    for version in range(1, steps + 1):
        if version not in made_by:
            violations.append(Violation(_NAME, f"no term made version {version}"))
            continue
        violations += _version(made_by[version], version, cells, pushed, computed)
    return violations


def _cell(event: Event) -> _Cell:
    return event["rank"], event["stage"]


def _key(cell: _Cell) -> str:
    return f"{cell[0]}.{cell[1]}"


def _named(cell: _Cell) -> str:
    return f"stage {cell[1]} of rank {cell[0]}"


def _version(
    term: Term,
    version: int,
    cells: Sequence[_Cell],
    pushed: Mapping[tuple[int, _Cell], set[str]],
    computed: set[tuple[int, _Cell]],
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
    for cell in cells:
        total = 0
        for event in events:
            shards = term.serving[event.name]["trained"].get(str(cell[1]), 0)
            applied = event.event == "applied"
            counted = event["shards"].get(_key(cell), 0) if applied else 0
            if counted != shards:
                text = f"{where}: {_named(cell)} counts in {counted} of {shards} shards of {event.name}"
                violations.append(Violation(_NAME, text, event.t))
            total += int(event["sums"].get(_key(cell), "0"), 16) if applied else 0
        sums = pushed.get((version - 1, cell))
        if sums and f"{total % _MODULUS:016x}" not in sums:
            text = f"{where}: what was applied of {_named(cell)} is not what was pushed: twice, or of another step"
            violations.append(Violation(_NAME, text, events[0].t))
        if (version - 1, cell) not in computed:
            violations.append(Violation(_NAME, f"{where}: no worker computed {_named(cell)} of step {version - 1}"))
    return violations


def _applied_twice(history: History) -> list[Violation]:
    times = Counter((event.name, event["term"], event["version"]) for event in history.of("applied"))
    return [
        Violation(_NAME, f"server {name} applied version {version} {count} times in term {term}")
        for (name, term, version), count in times.items()
        if count > 1
    ]


def _acknowledged(history: History, by_number: dict[int, Term]) -> list[Violation]:
    """A worker was told of a version only after every server of the term had applied it that owns what changes."""
    violations = []
    for event in history.of("acked"):
        term = by_number.get(event["term"])
        applied = {} if term is None else {each.name: each.t for each in term.applied.get(event["version"], [])}
        owners = [] if term is None else [name for name, each in term.serving.items() if each["versioned"]]
        late = [name for name in owners if applied.get(name, event.t + 1) > event.t]
        if term is None or late:
            text = f"version {event['version']} of term {event['term']} was acknowledged before {late} applied it"
            violations.append(Violation(_NAME, text, event.t))
    return violations
