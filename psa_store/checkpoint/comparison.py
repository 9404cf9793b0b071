"""How far every parameter is from one version to another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_store.checkpoint.catalog import StoredJob, read_job
from psa_store.errors import UsageError
from psa_store.job.layout import Shard, describe_difference
from psa_store.optim.tensors import as_bytes, to_torch
from psa_store.storage import Manifest, RedisStore
from psa_store.storage.sections import PARAM


@dataclass(slots=True)
class Change:
    """Of one tensor, from A to B. ``norm``: |B - A|; ``relative``: that over |A|; ``largest``: the largest element of
    |B - A|; ``cosine``: between A and B, 1.0 if both are zero, NaN if one is."""

    name: str
    elements: int
    norm: float
    relative: float
    largest: float
    cosine: float


@dataclass(slots=True)
class _Sums:
    a: float = 0.0
    b: float = 0.0
    ab: float = 0.0
    difference: float = 0.0
    largest: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        moved = b - a
        self.a += float(a.dot(a))
        self.b += float(b.dot(b))
        self.ab += float(a.dot(b))
        self.difference += float(moved.dot(moved))
        self.largest = max(self.largest, float(moved.abs().max()))


def compare(store: RedisStore, job: str, a: str, b: str, other: str | None = None) -> list[Change]:
    """Changes of all parameters and buffers, in the order of the model, computed in float64.

    Args:
        a, b: checkpoints or versions; ``b`` of the job ``other``, if given, whose layout must be the same.

    Raises:
        UsageError: there is no such checkpoint or version, or the layouts differ.
        DataIntegrity: stored bytes are damaged.
    """
    first = read_job(store, job)
    second = first if other is None else read_job(store, other)
    if first.layout.fingerprint != second.layout.fingerprint:
        raise UsageError(f"{job} and {other} cannot be compared: {describe_difference(first.layout, second.layout)}")
    from_a, from_b = first.manifests(a), second.manifests(b)
    sums = [_Sums() for _ in first.layout.tensors]
    for shard in first.layout.shards:
        pair = _read(store, first, shard, from_a), _read(store, second, shard, from_b)
        for tensor, low, high in _places(shard):
            sums[tensor].add(pair[0][low:high].double(), pair[1][low:high].double())
    return [
        Change(
            name=spec.name,
            elements=spec.numel,
            norm=math.sqrt(each.difference),
            relative=_ratio(math.sqrt(each.difference), math.sqrt(each.a)),
            largest=each.largest,
            cosine=1.0 if each.a == each.b == 0.0 else _ratio(each.ab, math.sqrt(each.a) * math.sqrt(each.b)),
        )
        for spec, each in zip(first.layout.tensors, sums, strict=True)
    ]


def _ratio(above: float, below: float) -> float:
    if below == 0.0:
        return 0.0 if above == 0.0 else math.nan
    return above / below


def _read(store: RedisStore, stored: StoredJob, shard: Shard, manifests: dict[int, Manifest]) -> Tensor:
    whole = torch.empty(shard.size_bytes, dtype=torch.uint8)
    store.load(stored.config.name, shard.index, manifests[shard.index], {PARAM: as_bytes(whole)})
    return whole.view(to_torch(shard.dtype))


def _places(shard: Shard) -> Iterator[tuple[int, int, int]]:
    """Tensor, and first and last element, of each piece."""
    for piece in shard.pieces:
        yield piece.tensor, piece.shard_start, piece.shard_start + piece.length
