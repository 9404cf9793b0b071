"""What checkpoints a job has: their documents in Redis, their names, which are kept, and how they are removed.

A checkpoint is a pin of one version in the head of every shard that changes, and a document. Before the first pin is
made the document says that it is being made, afterwards what it is (see ``take.py``); it is removed before the pins
are. So a pin without a document is what a removal, or a server that was late, has left; and what is being made is not
to be removed until it is old.

The data position and the state of every random generator need no place in it: both follow from the seed, the step and
the rank.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from psa_store.config import Settings
from psa_store.errors import DataIntegrity, UnknownJob, UsageError
from psa_store.job.config import JobConfig, check_name, job_config_from_json
from psa_store.job.document import Damaged, from_text, judged, to_text
from psa_store.job.layout import Layout, TensorRole, layout_from_json
from psa_store.storage import Head, Manifest, RedisStore

_AUTOMATIC = re.compile(r"\d{8}-\d{6}(-\d+)?")
FORK_PREFIX = "fork:"
"""Begins the name under which a job keeps what a fork of it shares; no checkpoint of a person can be called so."""
_MAKING_MAX_S = 3600.0
"""What is being made for longer is not being made any more."""


class Reason(StrEnum):
    """Why a checkpoint was taken."""

    ASKED = "asked"
    INTERVAL = "interval"
    END = "end"
    """The last server of the job left: it ended, or was told to (SIGTERM)."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The document of one checkpoint."""

    FORMAT: ClassVar[int] = 1

    name: str
    version: int
    step: int
    """Steps that every rank has behind it, where pushes are applied on arrival: the slowest."""
    term: int
    created_s: float
    """Seconds since 1970."""
    reason: Reason
    named: bool
    """Whether a person gave the name: then it stays until it is pruned by name."""
    bytes: int
    config: dict[str, Any]
    """The facts of the job, as :meth:`JobConfig.facts` writes them."""

    def to_json(self) -> str:
        return to_text(self)


def checkpoint_from_json(text: str) -> Checkpoint:
    """Read a checkpoint's document back; raises DataIntegrity if the text is none."""
    return from_text(Checkpoint, text, "the document of a checkpoint in Redis")


@dataclass(frozen=True, slots=True)
class Making:
    """The document of a checkpoint, or of what a fork shares, before its first pin is there."""

    FORMAT: ClassVar[int] = 1

    making_since_s: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """What the settings say of automatic checkpoints, and where all checkpoints go besides."""

    every_s: float | None
    keep: int
    older_than_s: float | None
    files: str | None

    @classmethod
    def from_settings(cls, settings: Settings) -> CheckpointPolicy:
        return cls(
            every_s=settings.checkpoint_every_s,
            keep=settings.checkpoint_keep,
            older_than_s=settings.checkpoint_keep_s,
            files=settings.checkpoint_files,
        )

    @property
    def automatic(self) -> bool:
        return self.every_s is not None


@dataclass(frozen=True, slots=True)
class StoredJob:
    """A job as it is in Redis."""

    config: JobConfig
    layout: Layout
    heads: Mapping[int, Head]
    checkpoints: Mapping[str, Checkpoint]
    """By name, oldest version first."""

    def reread(self, store: RedisStore) -> StoredJob:
        """As it is now. What a job is does not change, and takes longer to read than what it has stored."""
        return _with_versions(store, self.config, self.layout)

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
            frozen = shard.role is TensorRole.FROZEN
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
    return _with_versions(store, job_config_from_json(found[0]), layout_from_json(found[1]))


def _with_versions(store: RedisStore, config: JobConfig, layout: Layout) -> StoredJob:
    made = documents(store.read_checkpoints(config.name)).values()
    heads = store.heads(config.name, [shard.index for shard in layout.shards])
    by_age = sorted(made, key=lambda each: (each.version, each.created_s))
    return StoredJob(config, layout, {head.shard: head for head in heads}, {each.name: each for each in by_age})


def remove(store: RedisStore, job: str, layout: Layout, names: Collection[str]) -> None:
    """Remove checkpoints: the documents first, so that none is found that is half gone. Idempotent."""
    store.forget_checkpoints(job, names)
    store.unpin(job, [shard.index for shard in layout.versioned], names)


def sweep(store: RedisStore, job: str, layout: Layout) -> None:
    """Remove what attempts that were cut off, and forks that have moved on, have left."""
    known = store.read_checkpoints(job)
    shards = [shard.index for shard in layout.shards]
    pinned = {name for head in store.heads(job, shards) for name in head.pins}
    for name in sorted({name for name, text in known.items() if _is_over(store, name, text)} | (pinned - known.keys())):
        shared = _shared(store, job, shards, name.removeprefix(FORK_PREFIX)) if name.startswith(FORK_PREFIX) else set()
        if not shared:
            store.forget_checkpoints(job, [name])
        store.unpin(job, [shard for shard in shards if shard not in shared], [name])


def _is_over(store: RedisStore, name: str, text: str) -> bool:
    """Whether a document tells of something that is being made no longer: a fork exists, or it is too old."""
    if name.startswith(FORK_PREFIX) and store.has_job(name.removeprefix(FORK_PREFIX)):
        return True
    try:
        making = from_text(Making, text, "a checkpoint that is being made")
    except DataIntegrity:
        return False
    return making.making_since_s < time.time() - _MAKING_MAX_S


def documents(texts: Mapping[str, str]) -> dict[str, Checkpoint]:
    """The checkpoints that are made. What cannot be read is another release's, and left alone."""
    found = {}
    for name, text in texts.items():
        with suppress(DataIntegrity):
            found[name] = checkpoint_from_json(text)
    return found


def damaged_documents(texts: Mapping[str, str], key: str) -> list[Damaged]:
    """Those that are neither of a checkpoint nor of one that is being made. ``key``: where they are stored."""

    def parse(text: str) -> Checkpoint | Making:
        try:
            return from_text(Making, text, "a checkpoint that is being made")
        except DataIntegrity:
            return checkpoint_from_json(text)

    found = [judged(parse, text, f"{key} {name}") for name, text in texts.items()]
    return [each for each in found if isinstance(each, Damaged)]


def tidy(store: RedisStore, job: str, layout: Layout, policy: CheckpointPolicy) -> None:
    """Remove automatic checkpoints that are not to be kept, and what attempts that were cut off have left."""
    checkpoints = read_job(store, job).checkpoints.values()
    remove(store, job, layout, superfluous(checkpoints, keep=policy.keep, older_than_s=policy.older_than_s))
    sweep(store, job, layout)


def superfluous(checkpoints: Iterable[Checkpoint], *, keep: int | None, older_than_s: float | None) -> list[str]:
    """Which of those that no person named are to go: all but the newest ``keep``, and those of more than this age."""
    candidates = sorted((each for each in checkpoints if not each.named), key=lambda each: each.created_s)
    beyond = candidates[:-keep] if keep else candidates if keep == 0 else []
    old = [each for each in candidates if older_than_s is not None and time.time() - each.created_s > older_than_s]
    return list(dict.fromkeys(each.name for each in (*beyond, *old)))


def _shared(store: RedisStore, job: str, shards: Iterable[int], fork: str) -> set[int]:
    """The shards of which the fork still names chunks of this job."""
    forks = store.heads(fork, shards)
    return {head.shard for head in forks if any(each.home == job for each in head.entries().values())}


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
