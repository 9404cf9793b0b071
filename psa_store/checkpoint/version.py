"""One version of all shards of a job, as Redis has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from psa_store.errors import DataIntegrity, UnknownJob, UsageError
from psa_store.job import JobConfig, job_config_from_json
from psa_store.layout import Layout, Role, layout_from_json
from psa_store.storage import Manifest, RedisStore

PARAM = "param"
"""Section of every shard: its parameters or buffers."""
PUBLISHED = "published"
"""Section of a shard whose parameters travel compressed: as workers have them."""
RANK = "rank."
"""Begins the names of sections that hold what a rank carries, see :mod:`psa_store.rank_state`."""
CLOCK = "clock."
"""Begins the names of scalars that count the pushes of a rank, where they are applied on arrival."""
OPT_STEP = "opt_step"


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """What is needed to read one version of a job. Thread-safe. The store stays the caller's.

    ``manifests``: of every shard, at ``version``; of frozen ones, at version 0. ``pinned``: whether what they name
    stays; else it is dropped sooner or later, while training goes on.
    """

    store: RedisStore
    config: JobConfig
    layout: Layout
    version: int
    manifests: Mapping[int, Manifest]
    pinned: bool = False

    def read(self, shard: int, into: Mapping[str, memoryview]) -> None:
        """Read sections of a shard into memory of their size.

        Raises:
            UsageError: newer versions have replaced this one meanwhile.
            DataIntegrity: the stored bytes are damaged or missing.
        """
        manifest = self.manifests[shard]
        try:
            self.store.load(self.config.name, shard, manifest, into)
        except DataIntegrity as error:
            (head,) = self.store.heads(self.config.name, [shard])
            if (
                not self.pinned
                and any(each.version > manifest.version for each in head.manifests)
                and (head.manifest(manifest.version) is None)
            ):
                raise UsageError(
                    f"job {self.config.name!r}: version {self.version} was replaced by newer ones while it was read. "
                    "Try again, or read a version that a checkpoint pins."
                ) from error
            raise


def stored_version(store: RedisStore, job: str, version: int | None = None) -> StoredVersion:
    """A version that all shards have; None takes the newest.

    Raises:
        UnknownJob: there is no such job.
        UsageError: it has no such version; the message lists those that it has.
        DataIntegrity: no version is common to all shards, or one of a frozen shard is missing.
    """
    found = store.read_job(job)
    if found is None:
        raise UnknownJob(f"no job {job!r} in {store.where}; known jobs: {', '.join(store.jobs()) or 'none'}")
    config, layout = job_config_from_json(found[0]), layout_from_json(found[1])
    heads = {head.shard: head for head in store.heads(job, range(len(layout.shards)))}
    changing = [{each.version for each in heads[shard.index].manifests} for shard in layout.versioned]
    common = sorted(set.intersection(*changing)) if changing else [0]
    if not common:
        raise DataIntegrity(f"job {job!r}: no version is common to all shards in Redis")
    chosen = common[-1] if version is None else version
    if chosen not in common:
        raise UsageError(f"job {job!r} has no version {chosen}; stored versions: {common}")
    manifests = {}
    for shard in layout.shards:
        manifest = heads[shard.index].manifest(0 if shard.role is Role.FROZEN else chosen)
        if manifest is None:
            raise DataIntegrity(f"job {job!r}: frozen shard {shard.index} is missing in Redis")
        manifests[shard.index] = manifest
    return StoredVersion(store, config, layout, chosen, manifests)
