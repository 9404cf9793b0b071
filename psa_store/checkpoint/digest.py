"""One number for the whole state of a job, to compare runs bit by bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor
from xxhash import xxh3_128

from psa_store.errors import UnknownJob, UsageError
from psa_store.job.layout import TensorRole, layout_from_json
from psa_store.optim.tensors import as_bytes
from psa_store.storage import RedisStore


def state_digest(store: RedisStore, job: str, version: int) -> str:
    """sha256 of all parameters, buffers and the whole optimizer state of one version, read from Redis.

    Raises:
        UnknownJob, UsageError: there is no such job, or it has no such version.
        DataIntegrity: the stored bytes are damaged.
    """
    found = store.read_job(job)
    if found is None:
        raise UnknownJob(f"no job {job!r}")
    layout = layout_from_json(found[1])
    total = hashlib.sha256()
    for head in store.heads(job, [shard.index for shard in layout.shards]):
        frozen = layout.shards[head.shard].role is TensorRole.FROZEN
        manifest = head.manifest(0 if frozen else version)
        if manifest is None:
            stored = [each.version for each in head.manifests]
            raise UsageError(f"job {job!r}, shard {head.shard} has no version {version}; stored versions: {stored}")
        places = {section.name: bytearray(section.size_bytes) for section in manifest.sections}
        store.load(job, head.shard, manifest, {name: memoryview(place) for name, place in places.items()})
        for name in sorted(places):
            total.update(name.encode() + places[name])
        total.update(json.dumps(manifest.scalars, sort_keys=True).encode())
    return total.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """xxh3 of the names and bits of CPU tensors, in the order of their names: what somebody saw of a model."""
    total = xxh3_128()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(as_bytes(tensors[name].detach().contiguous().flatten()))
    return total.hexdigest()
