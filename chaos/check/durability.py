"""What was said to be durable is never lost, and no more than a bounded number of steps is computed again.

A version counts as durable once all servers of a term have said so, or a term has begun with it: every later term
must begin there or later. And a term begins at most two commit intervals behind what the one before it had applied:
one interval because steps are committed only so often, one more because a commit may be under way while training goes
on.
"""

from __future__ import annotations

import itertools
from collections import Counter

from chaos.check.lineage import Term, terms
from chaos.check.violation import Violation
from chaos.history import Event, History, Reference

_NAME = "durability"


def check(history: History, _reference: Reference) -> list[Violation]:
    """See the module. A run whose faults take from Redis what was durable there proves nothing here."""
    if not history.of("scenario") or history.scenario["loses_redis"]:
        return []
    found = terms(history)
    claims = {term.number: _claims(history, term) for term in found}
    violations = []
    for before, term in itertools.pairwise(found):
        for number, claimed in claims.items():
            lost = [version for version, t in claimed.items() if number < term.number and t < term.published_at]
            if max(lost, default=0) > term.resume:
                text = f"term {term.number} began at {term.resume}, but {max(lost)} was durable in term {number}"
                violations.append(Violation(_NAME, text, term.published_at))
        if term.resume < before.resume:
            text = f"term {term.number} began at {term.resume}, but term {before.number} had read {before.resume}"
            violations.append(Violation(_NAME, text, term.published_at))
        bound = 2 * history.scenario["commit_every"]
        if term.resume < before.newest - bound:
            text = f"term {term.number} began at {term.resume}: more than {bound} steps before {before.newest}"
            violations.append(Violation(_NAME, text, term.published_at))
    for event in history.of("durable"):
        committed = [e for e in history.of("committed") if e.name == event.name and e["version"] >= event["version"]]
        begun = [e for e in history.of("serving") if e.name == event.name and e["resume"] >= event["version"]]
        if not any(e.t <= event.t for e in (*committed, *begun)):
            text = f"{event.name} told a worker that {event['version']} is durable before it was"
            violations.append(Violation(_NAME, text, event.t))
    return [*violations, *_not_replaced(history)]


def _not_replaced(history: History) -> list[Violation]:
    """A server said that its commit of a version is durable, but the head goes on naming an earlier one.

    A head that was being read when the server said so counts for nothing: the next one was read afterwards.
    """
    said: dict[tuple[int, int, int], Event] = {}
    read_since: Counter[tuple[int, int, int]] = Counter()
    first_seen: dict[tuple[int, str], float] = {}
    violations = []
    for event in history.events:
        if event.event == "committed":
            for shard in event["nonces"]:
                key = int(shard), event["version"], event["term"]
                said[key] = event
                read_since[key] = 0
        elif event.event == "head":
            shard = event["shard"]
            for version, term, nonce in event["manifests"]:
                seen = first_seen.setdefault((shard, nonce), event.t)
                key = shard, version, term
                claim = said.get(key)
                if claim is None:
                    continue
                read_since[key] += 1
                wanted = claim["nonces"][str(shard)]
                if nonce != wanted and seen < claim.t and read_since[key] > 1:
                    text = f"{claim.name} said that version {version} of shard {shard} is {wanted}, but it is {nonce}"
                    violations.append(Violation(_NAME, text, event.t))
    return violations


def _claims(history: History, term: Term) -> dict[int, float]:
    """By version, when the last of all servers of a term said that it is durable."""
    said: dict[int, dict[str, float]] = {}
    for event in history.of("committed"):
        if event["term"] == term.number:
            said.setdefault(event["version"], {}).setdefault(event.name, event.t)
    return {version: max(by.values()) for version, by in said.items() if set(by) >= set(term.serving)}
