"""How far every parameter is from one version to another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from psa_store.checkpoint.catalog import read_job
from psa_store.checkpoint.reader import version_of
from psa_store.errors import UsageError
from psa_store.job.layout import describe_difference
from psa_store.storage import RedisStore


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
    from_a, from_b = version_of(store, first, a), version_of(store, second, b)
    sums = [_Sums() for _ in first.layout.tensors]
    for shard in first.layout.shards:
        pair = from_a.parameters(shard), from_b.parameters(shard)
        for piece in shard.pieces:
            place = slice(piece.shard_start, piece.shard_start + piece.length)
            sums[piece.tensor].add(pair[0][place].double(), pair[1][place].double())
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
