"""Which tensor lies in which safetensors file, and where, for one version of a job.

A safetensors file is a length of 8 bytes, a JSON text that names each tensor with its dtype, shape and range of bytes,
and these bytes without gaps. Here they come in the order of the arena, so that a file is written shard by shard, in one
pass. Wide elements come first: then each tensor lies on a multiple of its element's size.

* ``model*.safetensors`` has what ``state_dict`` has, under these names; of names that are tied, the first.
* ``optimizer*.safetensors`` has the rest: ``<section>.<name>`` for each slot of the optimizer, ``buffer.<name>`` for
  buffers that are not in ``state_dict``, and ``rank.<r>.shard.<i>`` for the bytes of what rank r carries of shard i.

Pure: no I/O, no threads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from psa_store.errors import DataIntegrity, UsageError
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import DIMENSIONS_MAX, SIZE_END, Layout, Piece, Shard, TensorSpec
from psa_store.optim.slots import AVERAGE
from psa_store.storage import Section
from psa_store.storage.sections import PARAM, RANK

MODEL = "model"
OPTIMIZER = "optimizer"
SUFFIX = ".safetensors"
INDEX = ".index.json"
LENGTH_BYTES = 8
_HEADER_BYTES_MAX = 100_000_000
"""As the library of safetensors has it."""
_ALIGN_BYTES = 8
_BUFFER = "buffer"
_DTYPES: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMES: Mapping[str, str] = {code: name for name, code in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Cut:
    """Bytes [low, high) of one section of a shard."""

    shard: int
    section: str
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its name there, and the bytes that it is made of."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]

    @property
    def size_bytes(self) -> int:
        return sum(cut.high - cut.low for cut in self.cuts)


@dataclass(frozen=True, slots=True)
class FileSpec:
    name: str
    entries: tuple[Entry, ...]

    def header(self) -> bytes:
        """All that comes before the tensors."""
        document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        low = 0
        for entry in self.entries:
            high = low + entry.size_bytes
            document[entry.key] = {
                "dtype": _DTYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [low, high],
            }
            low = high
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGN_BYTES)
        return len(text).to_bytes(LENGTH_BYTES, "little") + text

    def reads(self) -> list[tuple[int, str, list[Cut]]]:
        """What follows, as sections of shards in the order in which they are to be read, and what to take of each."""
        cuts = (cut for entry in self.entries for cut in entry.cuts)
        return [(*where, list(some)) for where, some in groupby(cuts, key=lambda cut: (cut.shard, cut.section))]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file has it: bytes [low, high) of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    low: int
    high: int


def split_into_files(layout: Layout, sections: Mapping[int, Sequence[Section]], max_file_bytes: int) -> list[FileSpec]:
    """The files that hold everything.

    Args:
        sections: of every shard.
        max_file_bytes: of the tensors in one file; a tensor that is larger has a file of its own.

    Raises:
        UsageError: ``max_file_bytes`` is not positive.
        DataIntegrity: neighbouring shards have different sections.
    """
    tensors = _Tensors(layout, sections)
    model: list[Entry] = []
    rest: list[Entry] = []
    for index in tensors.in_arena:
        spec = layout.tensors[index]
        (model if spec.persistent else rest).append(tensors.entry(param_key(spec), index, PARAM))
    for slot in slots_of(sections):
        for index in tensors.in_arena:
            if tensors.has(index, slot):
                rest.append(tensors.entry(slot_key(slot, layout.tensors[index]), index, slot))
    for shard_index, its in sections.items():
        for section in its:
            if section.name.startswith(RANK):
                whole = Cut(shard_index, section.name, 0, section.size_bytes)
                rest.append(Entry(rank_key(section.name, shard_index), "uint8", (section.size_bytes,), (whole,)))
    return [*_split(MODEL, model, max_file_bytes), *_split(OPTIMIZER, rest, max_file_bytes)]


def split_average_into_files(
    layout: Layout, sections: Mapping[int, Sequence[Section]], max_file_bytes: int
) -> list[FileSpec]:
    """The files of a model whose trained parameters are the average; arguments and errors as above."""
    tensors = _Tensors(layout, sections)
    entries = [
        tensors.entry(param_key(layout.tensors[i]), i, AVERAGE if tensors.has(i, AVERAGE) else PARAM)
        for i in tensors.in_arena
        if layout.tensors[i].persistent
    ]
    return _split(MODEL, entries, max_file_bytes)


class _Tensors:
    """Where each tensor of a layout lies in the sections of its shards."""

    def __init__(self, layout: Layout, sections: Mapping[int, Sequence[Section]]) -> None:
        self._specs = layout.tensors
        self._places: dict[int, list[tuple[Shard, Piece]]] = {index: [] for index in range(len(layout.tensors))}
        for shard in layout.shards:
            for piece in shard.pieces:
                self._places[piece.tensor].append((shard, piece))
        self._found = {shard: {section.name: section for section in its} for shard, its in sections.items()}
        self.in_arena = sorted(self._places, key=lambda index: (layout.offsets_bytes[index], index))

    def has(self, index: int, section: str) -> bool:
        return any(section in self._found[shard.index] for shard, _ in self._places[index][:1])

    def entry(self, key: str, index: int, section: str) -> Entry:
        spec, places = self._specs[index], self._places[index]
        try:
            (dtype,) = {self._found[shard.index][section].dtype for shard, _ in places} or {spec.dtype}
        except (KeyError, ValueError) as error:
            raise DataIntegrity(
                f"the shards of tensor {spec.name!r} do not have one section {section!r} each"
            ) from error
        item = ITEM_BYTES[dtype]
        cuts = (
            Cut(shard.index, section, piece.shard_start * item, (piece.shard_start + piece.length) * item)
            for shard, piece in places
        )
        return Entry(key, dtype, spec.shape, tuple(cuts))


def slots_of(sections: Mapping[int, Sequence[Section]]) -> list[str]:
    """The sections that have an element for each of a parameter's, like the slots of an optimizer."""
    names = dict.fromkeys(section.name for its in sections.values() for section in its)
    return [name for name in names if name != PARAM and not name.startswith(RANK)]


def index_of(files: Sequence[FileSpec], stem: str) -> tuple[str, str] | None:
    """Name and text of the index that Hugging Face's loaders want, if there is more than one file of this kind."""
    of_kind = [file for file in files if file.name.startswith(stem)]
    if len(of_kind) < 2:
        return None
    document = {
        "metadata": {"total_size": sum(entry.size_bytes for file in of_kind for entry in file.entries)},
        "weight_map": {entry.key: file.name for file in of_kind for entry in file.entries},
    }
    return f"{stem}{SUFFIX}{INDEX}", json.dumps(document, indent=1)


def header_bytes(file: str, length: bytes, size_bytes: int) -> int:
    """The length of the JSON text, from the first bytes of a file of this size; DataIntegrity if it cannot be."""
    size = int.from_bytes(length, "little")
    if len(length) != LENGTH_BYTES or size > min(_HEADER_BYTES_MAX, size_bytes - LENGTH_BYTES):
        raise DataIntegrity(f"{file}: it is no file of safetensors")
    return size


def read_header(file: str, text: bytes, size_bytes: int) -> dict[str, Stored]:
    """The tensors of a file by name, from its JSON text: each byte behind that belongs to one of them.

    Args:
        size_bytes: of the file.

    Raises:
        DataIntegrity: it cannot be read, has a dtype that we do not know, or tensors that overlap, leave gaps, are not
            as long as their shapes say, or do not end where the file does.
    """
    end = LENGTH_BYTES + len(text)
    try:
        document = json.loads(text)
        tensors = {key: _stored(file, document[key], end) for key in document.keys() - {"__metadata__"}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataIntegrity(f"{file}: its header cannot be read: {error!r}") from error
    for key, stored in sorted(tensors.items(), key=lambda each: (each[1].low, each[1].high)):
        if stored.low != end:
            raise DataIntegrity(f"{file}: tensor {key!r} begins at byte {stored.low}, what is before it ends at {end}")
        end = stored.high
    if end != size_bytes:
        raise DataIntegrity(f"{file}: its tensors end at byte {end}, it has {size_bytes}")
    return tensors


def _stored(file: str, facts: Mapping[str, Any], start: int) -> Stored:
    """Raises ValueError, KeyError or TypeError if a tensor cannot be like that."""
    dtype, shape = _NAMES[facts["dtype"]], facts["shape"]
    low, high = facts["data_offsets"]
    numbers = (low, high, *shape)
    if len(shape) > DIMENSIONS_MAX or not all(type(number) is int and 0 <= number < SIZE_END for number in numbers):
        raise ValueError(f"shape {str(shape)[:80]}, bytes {low} to {high}")
    if math.prod(shape) * ITEM_BYTES[dtype] != high - low:
        raise ValueError(f"{dtype} of shape {shape} in bytes {low} to {high}")
    return Stored(file, dtype, tuple(shape), start + low, start + high)


def param_key(spec: TensorSpec) -> str:
    return spec.name if spec.persistent else f"{_BUFFER}.{spec.name}"


def slot_key(slot: str, spec: TensorSpec) -> str:
    return f"{slot}.{spec.name}"


def rank_key(section: str, shard: int) -> str:
    return f"{section}.shard.{shard}"


def _split(stem: str, entries: Sequence[Entry], max_file_bytes: int) -> list[FileSpec]:
    # Sorting is stable: within one size, the order of the arena stays.
    if max_file_bytes < 1:
        raise UsageError(f"max_file_bytes={max_file_bytes}: must be at least 1")
    parts: list[list[Entry]] = []
    room = 0
    for entry in sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype]):
        if not parts or entry.size_bytes > room:
            parts.append([])
            room = max_file_bytes
        parts[-1].append(entry)
        room -= entry.size_bytes
    if len(parts) == 1:
        return [FileSpec(stem + SUFFIX, tuple(parts[0]))]
    return [
        FileSpec(f"{stem}-{number:05d}-of-{len(parts):05d}{SUFFIX}", tuple(part))
        for number, part in enumerate(parts, start=1)
    ]
