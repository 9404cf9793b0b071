"""A: every acknowledged gradient is in the final history once, every other one at most once.

A version of the final history was made by one epoch. Each of its servers must have applied it once, with the gradient
of every rank in every one of its shards once; and what it applied must be what a worker computed: fingerprints of
gradients are additive, so those of all servers add up to that of the worker.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from chaos.check.lineage import Epoch, epochs, makers
from chaos.check.violation import Violation
from chaos.journal import Journal, Truth

_NAME = "exactly_once"
_MODULUS = 1 << 64


def check(journal: Journal, _known: Truth) -> list[Violation]:
    """See the module."""
    if not journal.of("scenario"):
        return []
    steps, ranks = journal.scenario["steps"], journal.scenario["ranks"]
    found = epochs(journal)
    pushed: dict[tuple[int, int], set[str]] = defaultdict(set)
    for event in journal.of("pushed"):
        pushed[event["step"], event["rank"]].add(event["sum"])
    computed = {(event["step"], event["rank"]) for event in journal.of("computing")}
    violations = [
        Violation(_NAME, f"step {step}, rank {rank}: computed differently by different workers: {sorted(sums)}")
        for (step, rank), sums in pushed.items()
        if len(sums) > 1
    ]
    violations += _applied_twice(journal)
    violations += _acknowledged(journal, {epoch.number: epoch for epoch in found})
    history = makers(found, steps)
    for version in range(1, steps + 1):
        if version not in history:
            violations.append(Violation(_NAME, f"no epoch made version {version}"))
            continue
        violations += _version(history[version], version, ranks, pushed, computed)
    return violations


def _version(
    epoch: Epoch, version: int, ranks: int, pushed: dict[tuple[int, int], set[str]], computed: set[tuple[int, int]]
) -> list[Violation]:
    """One version of the final history."""
    events = epoch.applied.get(version, [])
    where = f"version {version} of epoch {epoch.number}"
    if {event.name for event in events} != set(epoch.serving):
        names = sorted(event.name for event in events)
        return [Violation(_NAME, f"{where} was applied by {names}, but its servers are {sorted(epoch.serving)}")]
    if all(event.event == "skipped" for event in events):
        return []
    violations = []
    for rank in range(ranks):
        total = 0
        for event in events:
            shards = len(epoch.serving[event.name]["trained"])
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
            violations.append(Violation(_NAME, f"{where}: nobody computed rank {rank} of step {version - 1}"))
    return violations


def _applied_twice(journal: Journal) -> list[Violation]:
    times = Counter((event.name, event["epoch"], event["version"]) for event in journal.of("applied"))
    return [
        Violation(_NAME, f"server {name} applied version {version} {count} times in epoch {epoch}")
        for (name, epoch, version), count in times.items()
        if count > 1
    ]


def _acknowledged(journal: Journal, by_number: dict[int, Epoch]) -> list[Violation]:
    """A worker was told of a version only after every server of the epoch had applied it."""
    violations = []
    for event in journal.of("acked"):
        epoch = by_number.get(event["epoch"])
        applied = {} if epoch is None else {each.name: each.t for each in epoch.applied.get(event["version"], [])}
        late = [] if epoch is None else [name for name in epoch.serving if applied.get(name, event.t + 1) > event.t]
        if epoch is None or late:
            text = f"version {event['version']} of epoch {event['epoch']} was acknowledged before {late} applied it"
            violations.append(Violation(_NAME, text, event.t))
    return violations
