"""What checkpoints a job has: their documents in Redis, and which of them are to be kept.

A checkpoint is a pin of one version in the head of every shard that changes, and a document that is written last; so a
document without all its pins, or a pin without a document, is what is left of an attempt or a removal that was cut off.
The data position and the state of every random generator need no place in it: both follow from the seed, the step and
the rank.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from psa_store.errors import DataIntegrity, UnknownJob, UsageError
from psa_store.job import JobConfig, check_name, job_config_from_json
from psa_store.layout import Layout, Role, layout_from_json
from psa_store.plan import newest_common
from psa_store.storage import Head, Manifest, RedisStore

_CLOCK = "clock."
"""Begins the names of scalars that count pushes, see ``server.lead``."""
_AUTOMATIC = re.compile(r"\d{8}-\d{6}(-\d+)?")


class Reason(StrEnum):
    """Why a checkpoint was taken."""

    ASKED = "asked"
    INTERVAL = "interval"
    END = "end"
    """The last server of the job left: it ended, or was told to (SIGTERM)."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The document of one checkpoint."""

    name: str
    version: int
    step: int
    """Steps that every rank has behind it, where pushes are applied on arrival: the slowest."""
    epoch: int
    created_s: float
    """Seconds since 1970."""
    reason: Reason
    named: bool
    """Whether a person gave the name: then it stays until it is pruned by name."""
    bytes: int
    config: dict[str, Any]
    """The facts of the job, as :meth:`JobConfig.facts` writes them."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def checkpoint_from_json(text: str) -> Checkpoint:
    """Rebuild a checkpoint; raises DataIntegrity if the text is not one."""
    try:
        document = json.loads(text)
        document["reason"] = Reason(document["reason"])
        return Checkpoint(**document)
    except (ValueError, TypeError, KeyError) as error:
        raise DataIntegrity(f"the document of a checkpoint cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as it is in Redis."""

    config: JobConfig
    layout: Layout
    heads: Mapping[int, Head]
    checkpoints: Mapping[str, Checkpoint]
    """By name, oldest version first."""

    def versions(self) -> list[int]:
        """The versions of training that all changing shards have, ascending."""
        shards = self.layout.versioned
        common = [{manifest.version for manifest in self.heads[shard.index].manifests} for shard in shards]
        return sorted(set.intersection(*common)) if common else [0]

    def manifests(self, what: str | int | None) -> dict[int, Manifest]:
        """The manifest of every shard, by shard: of a checkpoint, a version, or (None) the newest version.

        Raises:
            UsageError: there is no such checkpoint and no such version.
            DataIntegrity: a shard lacks it.
        """
        name = what if isinstance(what, str) and what in self.checkpoints else None
        version = self.version_of(what)
        found: dict[int, Manifest] = {}
        for shard in self.layout.shards:
            head = self.heads[shard.index]
            frozen = shard.role is Role.FROZEN
            pinned = None if name is None or frozen else head.pins.get(name)
            manifest = pinned or (None if name and not frozen else head.manifest(0 if frozen else version))
            if manifest is None:
                wanted = f"checkpoint {name!r}" if name else f"version {version}"
                raise DataIntegrity(f"job {self.config.name!r}: {wanted} is not whole, shard {shard.index} lacks it")
            found[shard.index] = manifest
        return found

    def version_of(self, what: str | int | None) -> int:
        """The version that a person means by the name of a checkpoint, or by a number; None: the newest."""
        versions = self.versions()
        if what is None:
            if not versions:
                raise DataIntegrity(f"job {self.config.name!r}: no version is common to all shards in Redis")
            return versions[-1]
        if isinstance(what, str) and what in self.checkpoints:
            return self.checkpoints[what].version
        version = int(what) if isinstance(what, int) or what.isdecimal() else None
        if version is None or version not in versions:
            raise UsageError(
                f"job {self.config.name!r} has neither a checkpoint nor a version {what!r}. Checkpoints: "
                f"{', '.join(self.checkpoints) or 'none'}; versions: {', '.join(map(str, versions)) or 'none'}"
            )
        return version

    def whole(self, name: str) -> bool:
        """Whether every shard has what the document of this checkpoint says."""
        shards = [self.heads[shard.index] for shard in self.layout.versioned]
        return all(name in head.pins and head.pins[name].version == self.checkpoints[name].version for head in shards)


def read_job(store: RedisStore, job: str) -> StoredJob:
    """Everything small that Redis has of a job; raises UnknownJob if it is not there."""
    found = store.read_job(job)
    if found is None:
        raise UnknownJob(f"no job {job!r} in {store.where}; known jobs: {', '.join(store.jobs()) or 'none'}")
    layout = layout_from_json(found[1])
    documents = [checkpoint_from_json(text) for text in store.read_checkpoints(job).values()]
    heads = store.heads(job, [shard.index for shard in layout.shards])
    by_age = sorted(documents, key=lambda each: (each.version, each.created_s))
    return StoredJob(
        job_config_from_json(found[0]), layout, {head.shard: head for head in heads}, {c.name: c for c in by_age}
    )


def complete(
    store: RedisStore,
    config: JobConfig,
    layout: Layout,
    name: str,
    version: int,
    *,
    epoch: int,
    reason: Reason,
    named: bool,
) -> Checkpoint:
    """Every shard has the pin: write the document, with which the checkpoint exists. May be repeated.

    Raises:
        DataIntegrity: a shard lacks the pin.
    """
    heads = store.heads(config.name, [shard.index for shard in layout.versioned])
    pins = [head.pins.get(name) for head in heads]
    if any(pin is None or pin.version != version for pin in pins):
        raise DataIntegrity(f"job {config.name!r}: checkpoint {name!r} lost its pins before it was complete")
    clocks = [value for pin in pins if pin for what, value in pin.scalars.items() if what.startswith(_CLOCK)]
    checkpoint = Checkpoint(
        name=name,
        version=version,
        step=int(min(clocks)) if clocks else version,
        epoch=epoch,
        created_s=time.time(),
        reason=reason,
        named=named,
        bytes=sum(section.size_bytes for pin in pins if pin for section in pin.sections),
        config=config.facts(),
    )
    store.write_checkpoint(config.name, name, checkpoint.to_json())
    return checkpoint


def remove(store: RedisStore, job: str, layout: Layout, names: Collection[str]) -> None:
    """Remove checkpoints: the documents first, so that nobody finds one that is half gone. Idempotent."""
    store.forget_checkpoints(job, names)
    store.unpin(job, [shard.index for shard in layout.versioned], names)


def sweep(store: RedisStore, job: str, layout: Layout, being_made: str | None) -> list[str]:
    """Remove pins without a document, which attempts that were cut off have left; returns their names."""
    known = store.read_checkpoints(job)
    heads = store.heads(job, [shard.index for shard in layout.versioned])
    orphans = {name for head in heads for name in head.pins if name not in known and name != being_made}
    orphans -= {name for name in orphans if is_fork_pin(name) and _shared(store, job, heads, name)}
    if orphans:
        store.unpin(job, [head.shard for head in heads], orphans)
    return sorted(orphans)


FORK_PREFIX = "fork:"
"""Begins the name under which a job keeps what a fork of it shares; no checkpoint of a person can be called so."""


def is_fork_pin(name: str) -> bool:
    return name.startswith(FORK_PREFIX)


def _shared(store: RedisStore, job: str, heads: Iterable[Head], name: str) -> bool:
    """Whether the fork still names chunks of this job."""
    forks = store.heads(name.removeprefix(FORK_PREFIX), [head.shard for head in heads])
    return any(manifest.home == job for fork in forks for manifest in fork.entries().values())


def superfluous(checkpoints: Iterable[Checkpoint], *, keep: int | None, older_than_s: float | None) -> list[str]:
    """Which of those that nobody named are to go: all but the newest ``keep``, and those of more than this age."""
    candidates = sorted((each for each in checkpoints if not each.named), key=lambda each: each.created_s)
    beyond = candidates[:-keep] if keep else candidates if keep == 0 else []
    old = [each for each in candidates if older_than_s is not None and time.time() - each.created_s > older_than_s]
    return list(dict.fromkeys(each.name for each in (*beyond, *old)))


def automatic_name(taken: Collection[str], when_s: float) -> str:
    """A name that says when, in UTC."""
    name = time.strftime("%Y%m%d-%H%M%S", time.gmtime(when_s))
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique


def is_automatic(name: str) -> bool:
    """Whether :func:`automatic_name` gave it. Such names sort by age."""
    return _AUTOMATIC.fullmatch(name) is not None


def checked_name(name: str) -> str:
    """Raise UsageError unless a person may call a checkpoint so: numbers and times have a meaning of their own."""
    check_name(name, "checkpoint name")
    if name.isdecimal() or is_automatic(name):
        raise UsageError(f"checkpoint name {name!r}: a number means a version, a time an automatic one; use a letter")
    return name


def save_at_rest(store: RedisStore, job: str, name: str | None, reason: Reason) -> Checkpoint:
    """Keep the newest version of a job that nobody serves.

    Raises:
        UsageError: the name is taken.
        DataIntegrity: no version is whole.
        Rewound: somebody has begun to serve the job, and the version was dropped meanwhile. Try again.
    """
    stored = read_job(store, job)
    if name is not None and checked_name(name) in stored.checkpoints:
        raise UsageError(f"job {job!r} has a checkpoint {name!r} already: prune it, or use another name")
    chosen = name or automatic_name(stored.checkpoints, time.time())
    shards = [shard.index for shard in stored.layout.versioned]
    heads = list(stored.heads.values())
    versions = {head.shard: [m.version for m in head.manifests] for head in heads if head.shard in shards}
    version = newest_common(versions) if versions else 0
    if version is None:
        raise DataIntegrity(f"job {job!r}: no version is common to all shards in Redis")
    store.pin(job, shards, version, chosen)
    epoch = max((head.epoch for head in heads), default=0)
    return complete(
        store, stored.config, stored.layout, chosen, version, epoch=epoch, reason=reason, named=name is not None
    )
