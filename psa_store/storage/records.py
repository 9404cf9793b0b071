"""What Redis knows about a shard, as plain data, and its readable JSON form."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

from psa_store.errors import DataIntegrity
from psa_store.storage import keys

CHUNK_BYTES = 4 << 20
"""Redis moves values of this size fastest, both ways."""
VERSION_PREFIX = "v:"
PIN_PREFIX = "c:"


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
    term: int
    nonce: str
    """Random, per attempt to commit: no attempt ever overwrites the chunks of another."""
    sections: tuple[Section, ...]
    scalars: dict[str, float | int]
    home: str = ""
    """The job whose chunks these are, if a fork shares them with the job that it began from."""
    extra: bool = False
    """Committed for a checkpoint, between the versions at which all shards commit: other shards may not have it."""

    @property
    def field(self) -> str:
        return version_field(self.version)

    def chunk_key(self, job: str, shard: int, section: str, index: int) -> str:
        return keys.chunk(self.home or job, shard, self.version, self.term, self.nonce, section, index)

    def chunk_keys(self, job: str, shard: int) -> list[str]:
        return [
            self.chunk_key(job, shard, section.name, index)
            for section in self.sections
            for index in range(len(section.digests))
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Head:
    """The committed versions of a shard, ascending, and the term whose owner alone may add to them."""

    shard: int
    term: int
    layout: str
    """Fingerprint of the layout; empty if the shard does not exist yet."""
    manifests: tuple[Manifest, ...]
    pins: Mapping[str, Manifest] = field(default_factory=dict)
    """By name of a checkpoint, the version that it keeps, also when it is none of ``manifests`` any more."""

    def manifest(self, version: int) -> Manifest | None:
        return next((each for each in self.manifests if each.version == version), None)

    def entries(self) -> dict[str, Manifest]:
        """All that the head names, by field."""
        pins = {pin_field(name): manifest for name, manifest in self.pins.items()}
        return {each.field: each for each in self.manifests} | pins

    def freed(self, job: str, gone: Collection[str]) -> list[str]:
        """The chunks that no field names any more once these are gone. What is shared with another job is not ours."""
        entries = self.entries()
        left = {manifest.nonce for each, manifest in entries.items() if each not in gone}
        freed = {
            manifest.nonce: manifest
            for each, manifest in entries.items()
            if each in gone and manifest.nonce not in left and not manifest.home
        }
        return [key for manifest in freed.values() for key in manifest.chunk_keys(job, self.shard)]


def version_field(version: int) -> str:
    return f"{VERSION_PREFIX}{version:020d}"


def term_text(term: int) -> str:
    """Fixed width, so that Lua compares text: its numbers lose the last bits of large integers."""
    return f"{term:016x}"


def pin_field(name: str) -> str:
    return PIN_PREFIX + name


def identity(head: Head) -> list[str | int]:
    """How many fields, then name and nonce of each: by this a function knows the head that the caller has read."""
    entries = head.entries()
    return [len(entries), *(part for each, manifest in entries.items() for part in (each, manifest.nonce))]


def chunk_sizes(size_bytes: int) -> list[int]:
    return [min(CHUNK_BYTES, size_bytes - low) for low in range(0, size_bytes, CHUNK_BYTES)]


def split_chunks(data: memoryview) -> list[memoryview]:
    """The chunks of an array, without a copy."""
    flat = data.cast("B")
    return [flat[low : low + CHUNK_BYTES] for low in range(0, len(flat), CHUNK_BYTES)]


def head_from_fields(job: str, shard: int, fields: Mapping[bytes, bytes]) -> Head:
    """Decode a head; raises DataIntegrity naming job and shard if it cannot be read."""
    try:
        manifests = [_manifest(value) for name, value in fields.items() if name.startswith(VERSION_PREFIX.encode())]
        pins = {
            name.decode().removeprefix(PIN_PREFIX): _manifest(value)
            for name, value in fields.items()
            if name.startswith(PIN_PREFIX.encode())
        }
        return Head(
            shard,
            int(fields.get(b"term", b"0"), 16),
            fields.get(b"layout", b"").decode(),
            tuple(sorted(manifests, key=lambda manifest: manifest.version)),
            pins,
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
