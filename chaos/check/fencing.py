"""No zombie writes, and epochs only grow.

The reader looks at the heads in Redis all the time. Once it has seen a head sealed at an epoch, a version that an older
epoch wrote must not appear there any more.
"""

from __future__ import annotations

from chaos.check.violation import Violation
from chaos.journal import Journal, Truth

_NAME = "fencing"


def check(journal: Journal, _known: Truth) -> list[Violation]:
    """See the module."""
    return [*_epochs_grow(journal), *_no_commit_after_a_seal(journal)]


def _epochs_grow(journal: Journal) -> list[Violation]:
    violations = []
    newest = 0
    for event in journal.of("published"):
        if event["epoch"] <= newest:
            text = f"epoch {event['epoch']} was published after epoch {newest}"
            violations.append(Violation(_NAME, text, event.t))
        newest = max(newest, event["epoch"])
    last: dict[tuple[str, str], int] = {}
    for event in journal.events:
        if event.event in ("serving", "loaded"):
            before = last.get((event.role, event.name), 0)
            if event["epoch"] < before:
                text = f"{event.role} {event.name} went from epoch {before} back to {event['epoch']}"
                violations.append(Violation(_NAME, text, event.t))
            last[event.role, event.name] = event["epoch"]
    return violations


def _no_commit_after_a_seal(journal: Journal) -> list[Violation]:
    violations = []
    wiped = [event.t for event in journal.of("fault") if "wipe-redis" in event["kind"]]
    sealed: dict[int, int] = {}
    known: dict[int, set[str]] = {}
    for event in journal.of("head"):
        shard, epoch = event["shard"], event["epoch"]
        if any(t < event.t for t in wiped):
            break  # what Redis forgot cannot be held against anybody
        if epoch < sealed.get(shard, 0):
            text = f"the head of shard {shard} went from epoch {sealed[shard]} back to {epoch}"
            violations.append(Violation(_NAME, text, event.t))
        for version, writer, nonce in event["manifests"]:
            if writer < sealed.get(shard, 0) and nonce not in known.get(shard, set()):
                text = f"version {version} of shard {shard} came from epoch {writer} after the seal of {sealed[shard]}"
                violations.append(Violation(_NAME, text, event.t))
        sealed[shard] = max(epoch, sealed.get(shard, 0))
        known.setdefault(shard, set()).update(nonce for _, _, nonce in event["manifests"])
    return violations
