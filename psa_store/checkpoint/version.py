"""One version of all shards of a job, as Redis has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from psa_store.checkpoint.catalog import read_job
from psa_store.errors import DataIntegrity, UsageError
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout
from psa_store.storage import Manifest, RedisStore


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


def stored_version(store: RedisStore, job: str, what: str | int | None = None) -> StoredVersion:
    """A checkpoint by its name, or a version that all shards have; None takes the newest.

    Raises:
        UnknownJob: there is no such job.
        UsageError: it has neither such a checkpoint nor such a version; the message lists those that it has.
        DataIntegrity: no version is common to all shards, or a shard lacks this one.
    """
    found = read_job(store, job)
    pinned = what in found.checkpoints
    return StoredVersion(store, found.config, found.layout, found.version_of(what), found.manifests(what), pinned)
