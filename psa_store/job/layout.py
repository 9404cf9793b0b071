"""The map from parameters to shards: a pure function of names, shapes, dtypes, roles and shard size.

All tensors of a model are laid out in one *arena*, a flat range of bytes that workers and servers address alike::

    | trained float32 ....... | trained bfloat16 ... | buffers float32 | buffers int64 | frozen float32 ... |
    | shard 0 | shard 1 | ..  | shard 5 | shard 6 |  | shard 7         | shard 8       | shard 9 | shard 10 |

* A *segment* holds all tensors of one role, one dtype and the same stages, in the order of the model; it starts on a
  page, so that shards can be mapped side by side. So no shard straddles a stage, and a worker needs those of its stages
  only.
* Every tensor starts on a multiple of 64 bytes: vector kernels may give other last bits for other alignments, and
  bit-identity must not depend on where an allocator happened to put a tensor.
* A *shard* is a contiguous slice of one segment: the unit of ownership, reduction, version and commit. All shards of
  a segment but its last have exactly ``shard_bytes`` bytes. A shard may hold pieces of several tensors, and a tensor
  may span several shards. Gaps between tensors belong to the shard and hold zeros.

Pure: no I/O, no threads, no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from psa_store.errors import DataIntegrity, UsageError
from psa_store.job.document import ADDED_LATER, from_text, to_text
from psa_store.job.dtypes import ITEM_BYTES, TRAINABLE_DTYPES

PAGE_BYTES = 4096
TENSOR_ALIGN_BYTES = 64
SHARD_BYTES_MIN = 1 << 20
SHARD_BYTES_MAX = 256 << 20
SHARDS_AIM = 64
"""Default shard sizes aim at this many shards, so that few servers can share them out evenly."""
SHARDS_MAX = 1 << 18
"""More are no layout that anything can serve, and would fill the memory of the process that lays them out."""
SIZE_END = 1 << 48
"""No tensor has so many bytes, or any of its dimensions so many elements."""
DIMENSIONS_MAX = 64
"""As torch has it."""


class TensorRole(StrEnum):
    """What happens to a tensor during training; the values fix the order of roles in the arena."""

    TRAINED = "trained"  # gradient from every rank, updated by the optimizer
    BUFFER = "buffer"  # replaced by rank 0's value at every step
    FROZEN = "frozen"  # stored once, at version 0


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model. ``names``: its canonical name first, then the names that share its memory (tied)."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    role: TensorRole
    group: int = 0
    """Index of its optimizer parameter group; 0 where the role is not TRAINED."""
    persistent: bool = True
    """False for buffers that the model keeps out of its ``state_dict``."""
    stages: tuple[int, ...] = field(default=(0,), metadata=ADDED_LATER)
    """Those that have it, in order; several, where it is tied across stages."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def home(self) -> int:
        """The stage whose cells push its gradient."""
        return self.stages[0]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements of one tensor inside one shard. All units are elements of the shard's dtype."""

    tensor: int
    tensor_start: int
    shard_start: int
    length: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous slice of the arena; ``pieces`` are in order and do not overlap."""

    index: int
    role: TensorRole
    dtype: str
    offset_bytes: int
    size_bytes: int
    pieces: tuple[Piece, ...] = field(repr=False)
    stages: tuple[int, ...] = (0,)
    """Those that have its tensors."""

    @property
    def numel(self) -> int:
        return self.size_bytes // ITEM_BYTES[self.dtype]

    @property
    def home(self) -> int:
        """The stage whose cells push its gradient."""
        return self.stages[0]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every tensor and shard lies in the arena. Build it with :func:`make_layout`; equal inputs, equal layout."""

    tensors: tuple[TensorSpec, ...]
    offsets_bytes: tuple[int, ...]
    """Place of each tensor in the arena, parallel to ``tensors``."""
    shards: tuple[Shard, ...]
    shard_bytes: int
    arena_bytes: int
    fingerprint: str
    """sha256 over everything above, 64 hex digits: two processes agree on the layout if they agree on this."""

    def shards_of(self, *roles: TensorRole) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.role in roles)

    @property
    def versioned(self) -> tuple[Shard, ...]:
        """The shards that change with every step; frozen ones stay at version 0."""
        return self.shards_of(TensorRole.TRAINED, TensorRole.BUFFER)

    def tensor_at(self, shard: Shard, element: int) -> str:
        """Name of the tensor that holds ``element`` of ``shard``, for error messages."""
        for piece in shard.pieces:
            if piece.shard_start <= element < piece.shard_start + piece.length:
                return self.tensors[piece.tensor].name
        return f"padding of shard {shard.index}"

    def to_json(self) -> str:
        """A text from which :func:`layout_from_json` builds the same layout."""
        return to_text(StoredLayout(self.shard_bytes, self.tensors))


@dataclass(frozen=True, slots=True)
class StoredLayout:
    """What a layout is made from, as a document: the rest follows from it."""

    FORMAT: ClassVar[int] = 1

    shard_bytes: int
    tensors: tuple[TensorSpec, ...]


def default_shard_bytes(total_bytes: int) -> int:
    """A power of two that gives about ``SHARDS_AIM`` shards, within the limits above."""
    aim = max(1, total_bytes // SHARDS_AIM)
    return min(SHARD_BYTES_MAX, max(SHARD_BYTES_MIN, 1 << (aim - 1).bit_length()))


def make_layout(tensors: Iterable[TensorSpec], shard_bytes: int | None = None) -> Layout:
    """Lay tensors out in an arena and cut it into shards.

    Args:
        tensors: in the order of the model; this order decides places, so it must be the same in every process.
        shard_bytes: a multiple of 4096; ``None`` chooses by the total size.

    Raises:
        UsageError: no tensors, a name twice, an unknown or untrainable dtype, or an unusable shard size.
    """
    specs = tuple(tensors)
    _check(specs)
    if shard_bytes is None:
        shard_bytes = default_shard_bytes(sum(spec.size_bytes for spec in specs))
    if shard_bytes < PAGE_BYTES or shard_bytes % PAGE_BYTES:
        raise UsageError(f"shard_bytes={shard_bytes}: must be a positive multiple of {PAGE_BYTES}")
    total_bytes = sum(spec.size_bytes for spec in specs)
    if total_bytes > SHARDS_MAX * shard_bytes:
        raise UsageError(
            f"shard_bytes={shard_bytes}: {total_bytes:,} bytes are more than {SHARDS_MAX:,} shards: use larger ones"
        )

    offsets = [0] * len(specs)
    shards: list[Shard] = []
    cursor = 0
    for role in TensorRole:
        dtypes = {dtype: place for place, dtype in enumerate(dict.fromkeys(s.dtype for s in specs if s.role is role))}
        segments = dict.fromkeys((spec.dtype, spec.stages) for spec in specs if spec.role is role)
        for dtype, stages in sorted(segments, key=lambda each: dtypes[each[0]]):
            members = [
                i for i, each in enumerate(specs) if (each.role, each.dtype, each.stages) == (role, dtype, stages)
            ]
            start = _round_up(cursor, PAGE_BYTES)
            end = start
            for i in members:
                offsets[i] = end
                end = _round_up(end + specs[i].size_bytes, TENSOR_ALIGN_BYTES)
            shards += _cut(specs, offsets, members, start, end, shard_bytes, len(shards))
            cursor = end
    return Layout(specs, tuple(offsets), tuple(shards), shard_bytes, cursor, _fingerprint(specs, offsets, shards))


def layout_from_json(text: str, what: str = "the stored layout") -> Layout:
    """Rebuild a layout from :meth:`Layout.to_json`.

    Raises:
        DataIntegrity: the text is not a layout, or of a format that this release does not know; names ``what``.
    """
    stored = from_text(StoredLayout, text, what)
    try:
        return make_layout(stored.tensors, stored.shard_bytes)
    except UsageError as error:
        raise DataIntegrity(f"{what} cannot be read: {error}") from error


def describe_difference(ours: Layout, theirs: Layout) -> str:
    """One sentence that names the first difference between two layouts, for an error message."""
    mine = {spec.name: spec for spec in ours.tensors}
    other = {spec.name: spec for spec in theirs.tensors}
    for name in mine:
        if name not in other:
            return f"tensor {name!r} is in this model but not in the job"
    for name in other:
        if name not in mine:
            return f"tensor {name!r} is in the job but not in this model"
    for name, spec in mine.items():
        stored = other[name]
        for what in ("shape", "dtype", "role", "group", "persistent", "names", "stages"):
            if getattr(spec, what) != getattr(stored, what):
                here, there = getattr(spec, what), getattr(stored, what)
                way = "; `psa checkpoint import --like` cuts an export anew" if what == "stages" else ""
                return f"tensor {name!r} has {what} {here} in this model and {there} in the job{way}"
    if ours.shard_bytes != theirs.shard_bytes:
        return f"shard_bytes is {ours.shard_bytes} here and {theirs.shard_bytes} in the job"
    return "the tensors come in another order"


def _check(specs: Sequence[TensorSpec]) -> None:
    if not specs:
        raise UsageError("the model has no parameters and no buffers: there is nothing to store")
    seen: set[str] = set()
    for spec in specs:
        if not spec.names or not spec.stages:
            raise UsageError("a tensor has no name, or is in no stage")
        if len(spec.shape) > DIMENSIONS_MAX or not all(0 <= length < SIZE_END for length in spec.shape):
            raise UsageError(f"tensor {spec.name!r} has shape {str(spec.shape)[:80]}, which no tensor can have")
        for name in spec.names:
            if name in seen:
                raise UsageError(f"two tensors are called {name!r}")
            seen.add(name)
        if spec.dtype not in ITEM_BYTES:
            known = ", ".join(ITEM_BYTES)
            raise UsageError(f"tensor {spec.name!r} has dtype {spec.dtype}; supported: {known}")
        if spec.size_bytes >= SIZE_END:
            raise UsageError(
                f"tensor {spec.name!r} of shape {spec.shape} has {spec.size_bytes} bytes, which is too much"
            )
        if spec.role is TensorRole.TRAINED and spec.dtype not in TRAINABLE_DTYPES:
            raise UsageError(f"tensor {spec.name!r} has dtype {spec.dtype}, which cannot be trained")


def _cut(
    specs: Sequence[TensorSpec],
    offsets: Sequence[int],
    members: Sequence[int],
    start: int,
    end: int,
    shard_bytes: int,
    first_index: int,
) -> list[Shard]:
    """Cut the segment [start, end) into shards; one pass over its members, which are in order of offset."""
    first = specs[members[0]]
    role, dtype, stages = first.role, first.dtype, first.stages
    item = ITEM_BYTES[dtype]
    shards: list[Shard] = []
    first_member = 0
    for low in range(start, end, shard_bytes):
        high = min(low + shard_bytes, end)
        pieces = []
        while first_member < len(members) and (
            offsets[members[first_member]] + specs[members[first_member]].size_bytes <= low
        ):
            first_member += 1
        for i in members[first_member:]:
            if offsets[i] >= high:
                break
            piece_low = max(low, offsets[i])
            piece_high = min(high, offsets[i] + specs[i].size_bytes)
            if piece_low < piece_high:
                pieces.append(
                    Piece(
                        tensor=i,
                        tensor_start=(piece_low - offsets[i]) // item,
                        shard_start=(piece_low - low) // item,
                        length=(piece_high - piece_low) // item,
                    )
                )
        shards.append(Shard(first_index + len(shards), role, dtype, low, high - low, tuple(pieces), stages))
    return shards


def _fingerprint(specs: Sequence[TensorSpec], offsets: Sequence[int], shards: Sequence[Shard]) -> str:
    document = [
        [_described(spec) for spec in specs],
        list(offsets),
        [[s.index, s.role, s.dtype, s.offset_bytes, s.size_bytes] for s in shards],
    ]
    return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()


def _described(spec: TensorSpec) -> dict[str, Any]:
    """A layout without stages has the fingerprint that it had before there were any."""
    described = asdict(spec)
    if spec.stages == (0,):
        del described["stages"]
    return described


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
