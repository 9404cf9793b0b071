"""No zombie writes, and terms only grow.

The reader looks at the heads in Redis all the time. Once it has seen a head sealed at a term, a version that an older
term wrote must not appear there any more. A head that has no term was written over or deleted by another program.
"""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.history import History, Reference

_NAME = "fencing"


def check(history: History, _reference: Reference) -> list[Violation]:
    """See the module."""
    return [*_terms_grow(history), *_no_commit_after_a_seal(history)]


def _terms_grow(history: History) -> list[Violation]:
    violations = []
    newest = 0
    for event in history.of("published"):
        if event["term"] <= newest:
            text = f"term {event['term']} was published after term {newest}"
            violations.append(Violation(_NAME, text, event.t))
        newest = max(newest, event["term"])
    last: dict[tuple[str, str], int] = {}
    for event in history.events:
        if event.event in ("serving", "loaded"):
            before = last.get((event.role, event.name), 0)
            if event["term"] < before:
                text = f"{event.role} {event.name} went from term {before} back to {event['term']}"
                violations.append(Violation(_NAME, text, event.t))
            last[event.role, event.name] = event["term"]
    return violations


def _no_commit_after_a_seal(history: History) -> list[Violation]:
    violations = []
    wiped = [event.t for event in history.of("fault") if "wipe-redis" in event["kind"]]
    sealed: dict[int, int] = {}
    known: dict[int, set[str]] = {}
    for event in history.of("head"):
        shard, term = event["shard"], event["term"]
        if any(t < event.t for t in wiped):
            break  # a wiped Redis knows no seals
        if not term:
            continue
        if term < sealed.get(shard, 0):
            text = f"the head of shard {shard} went from term {sealed[shard]} back to {term}"
            violations.append(Violation(_NAME, text, event.t))
        for version, writer, nonce in event["manifests"]:
            if writer < sealed.get(shard, 0) and nonce not in known.get(shard, set()):
                text = f"version {version} of shard {shard} came from term {writer} after the seal of {sealed[shard]}"
                violations.append(Violation(_NAME, text, event.t))
        sealed[shard] = max(term, sealed.get(shard, 0))
        known.setdefault(shard, set()).update(nonce for _, _, nonce in event["manifests"])
    return violations
