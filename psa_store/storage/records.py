"""What Redis knows about a shard, as plain data, and its readable JSON form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from psa_store.errors import DataIntegrity
from psa_store.storage import keys

CHUNK_BYTES = 4 << 20
"""Redis moves values of this size fastest, both ways."""
VERSION_PREFIX = "v:"


@dataclass(frozen=True, slots=True)
class Section:
    """One array of a shard's state: parameters, or one kind of optimizer state."""

    name: str
    dtype: str
    size_bytes: int
    digests: tuple[str, ...]
    """xxh3_128 of each chunk, in order."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One committed version of one shard."""

    version: int
    epoch: int
    nonce: str
    """Random, per attempt to commit: no attempt ever overwrites the chunks of another."""
    sections: tuple[Section, ...]
    scalars: dict[str, float | int]

    @property
    def field(self) -> str:
        return version_field(self.version)

    def chunk_keys(self, job: str, shard: int) -> list[str]:
        return [
            keys.chunk(job, shard, self.version, self.epoch, self.nonce, section.name, index)
            for section in self.sections
            for index in range(len(section.digests))
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Head:
    """The committed versions of a shard, ascending, and the epoch whose owner alone may add to them."""

    shard: int
    epoch: int
    layout: str
    """Fingerprint of the layout; empty if the shard does not exist yet."""
    manifests: tuple[Manifest, ...]

    def manifest(self, version: int) -> Manifest | None:
        return next((each for each in self.manifests if each.version == version), None)


def version_field(version: int) -> str:
    return f"{VERSION_PREFIX}{version:020d}"


def epoch_text(epoch: int) -> str:
    """Fixed width, so that Lua compares text: its numbers lose the last bits of large integers."""
    return f"{epoch:016x}"


def identities(manifests: Iterable[Manifest]) -> list[str]:
    """Field and nonce of each, by which a function recognises what the caller has read."""
    return [part for each in manifests for part in (each.field, each.nonce)]


def chunk_sizes(size_bytes: int) -> list[int]:
    return [min(CHUNK_BYTES, size_bytes - low) for low in range(0, size_bytes, CHUNK_BYTES)]


def split_chunks(data: memoryview) -> list[memoryview]:
    """The chunks of an array, without a copy."""
    flat = data.cast("B")
    return [flat[low : low + CHUNK_BYTES] for low in range(0, len(flat), CHUNK_BYTES)]


def head_from_fields(job: str, shard: int, fields: Mapping[bytes, bytes]) -> Head:
    """Decode a head; raises DataIntegrity naming job and shard if it cannot be read."""
    try:
        manifests = [_manifest(value) for field, value in fields.items() if field.startswith(VERSION_PREFIX.encode())]
        return Head(
            shard,
            int(fields.get(b"epoch", b"0"), 16),
            fields.get(b"layout", b"").decode(),
            tuple(sorted(manifests, key=lambda manifest: manifest.version)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataIntegrity(f"job {job!r}, shard {shard}: the head in Redis cannot be read: {error}") from error


def _manifest(text: bytes) -> Manifest:
    document = json.loads(text)
    document["sections"] = tuple(
        Section(each["name"], each["dtype"], each["size_bytes"], tuple(each["digests"]))
        for each in document["sections"]
    )
    return Manifest(**document)
