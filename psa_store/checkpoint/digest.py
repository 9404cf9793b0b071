"""One number for the whole state of a job, to compare runs bit by bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor
from xxhash import xxh3_128

from psa_store.checkpoint.reader import open_version
from psa_store.optim.tensors import as_bytes
from psa_store.storage import RedisStore


def state_digest(store: RedisStore, job: str, version: int) -> str:
    """sha256 of all parameters, buffers and the whole optimizer state of one version, read from Redis.

    Raises:
        UnknownJob, UsageError: there is no such job, or it has no such version.
        DataIntegrity: the stored bytes are damaged.
    """
    stored, total = open_version(store, job, version), hashlib.sha256()
    for shard, manifest in stored.manifests.items():
        for name, data in sorted(stored.sections(shard).items()):
            total.update(name.encode())
            total.update(data)
        total.update(json.dumps(manifest.scalars, sort_keys=True).encode())
    return total.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """xxh3 of the names and bits of CPU tensors, in the order of their names: what a process saw of a model."""
    total = xxh3_128()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(as_bytes(tensors[name].detach().contiguous().flatten()))
    return total.hexdigest()
