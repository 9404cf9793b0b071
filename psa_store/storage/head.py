"""The head of a shard: which versions Redis has, which of them are pinned, and which term owns the shard.

A field of the head is a manifest, a small JSON document that a person can read. Of these the Lua functions look at the
nonce alone.

What another process wrote into a head, and can not be read, is *damaged*: it stands in the way of nothing. Readers see
the rest, a commit takes damaged versions out, and a term or layout that is none is written again by the next seal.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from psa_store.errors import DataIntegrity
from psa_store.job.document import Damaged, from_text, to_text
from psa_store.storage import keys

CHUNK_BYTES = 4 << 20
"""Redis moves values of this size fastest, both ways."""
TERMS_AHEAD_MAX = 1 << 40
"""A term in Redis that is this far above ours is no term: a seal writes over it."""
VERSION_PREFIX = "v:"
PIN_PREFIX = "c:"
_OF_THE_OWNER = {b"term": re.compile(rb"[0-9a-f]{16}"), b"layout": re.compile(rb"[0-9a-f]{64}")}
"""The fields that are no manifests, and what each looks like."""


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

    FORMAT: ClassVar[int] = 1

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
        return to_text(self)


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
    damaged: Mapping[bytes, str] = field(default_factory=dict)
    """By name of a field that can not be read, why not."""

    @property
    def damaged_versions(self) -> list[bytes]:
        """Fields of versions that can not be read."""
        return sorted(each for each in self.damaged if each.startswith(VERSION_PREFIX.encode()))

    def damage(self, job: str) -> list[Damaged]:
        """What can not be read of it, and where that stands."""
        key = keys.head(job, self.shard)
        return [Damaged(f"{key} {name.decode(errors='replace')}", why) for name, why in self.damaged.items()]

    def manifest(self, version: int) -> Manifest | None:
        return next((each for each in self.manifests if each.version == version), None)

    def names(self, manifest: Manifest) -> bool:
        """Whether a version or a pin of this head is that very commit."""
        return any(each.nonce == manifest.nonce for each in self.entries().values())

    def entries(self) -> dict[str, Manifest]:
        """All that the head names, by field."""
        pins = {pin_field(name): manifest for name, manifest in self.pins.items()}
        return {each.field: each for each in self.manifests} | pins

    def freed(self, job: str, gone: Collection[str | bytes]) -> list[str]:
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


def newest_term(heads: Iterable[Head], known: int) -> int:
    """The highest term of these heads that can be one; 0 if none has any. ``known``: one that was taken.

    The seal of the next term writes over what is left out here: that is further above it than it may be.
    """
    return max((head.term for head in heads if head.term < known + 2 * TERMS_AHEAD_MAX), default=0)


def pin_field(name: str) -> str:
    return PIN_PREFIX + name


def identity(head: Head) -> list[str | int | bytes]:
    """How many fields, then name and nonce of each: by this a function knows the head that the caller has read.

    A field that can not be read has no nonce; whatever it says, nothing depends on it.
    """
    entries = head.entries()
    damaged = sorted(head.damaged.keys() - _OF_THE_OWNER)
    return [
        len(entries) + len(damaged),
        *(part for each, manifest in entries.items() for part in (each, manifest.nonce)),
        *(part for each in damaged for part in (each, b"")),
    ]


def chunk_sizes(size_bytes: int) -> list[int]:
    return [min(CHUNK_BYTES, size_bytes - low) for low in range(0, size_bytes, CHUNK_BYTES)]


def split_chunks(data: memoryview) -> list[memoryview]:
    """The chunks of an array, without a copy."""
    flat = data.cast("B")
    return [flat[low : low + CHUNK_BYTES] for low in range(0, len(flat), CHUNK_BYTES)]


def head_from_fields(job: str, shard: int, fields: Mapping[bytes, bytes]) -> Head:
    """Decode a head. What of it can not be read is set aside, field by field."""
    what = f"job {job!r}, shard {shard}: the head in Redis"
    manifests: list[Manifest] = []
    pins: dict[str, Manifest] = {}
    damaged: dict[bytes, str] = {}
    for name, value in fields.items():
        try:
            match name.decode()[: len(VERSION_PREFIX)]:
                case _ if name in _OF_THE_OWNER:
                    if not _OF_THE_OWNER[name].fullmatch(value):
                        raise DataIntegrity(f"{what} cannot be read: {value[:80]!r} is no {name.decode()}")
                case "v:":
                    manifest = manifest_from_text(value, what)
                    if name.decode() != manifest.field:
                        raise DataIntegrity(f"{what} cannot be read: this is version {manifest.version}")
                    manifests.append(manifest)
                case "c:":
                    pins[name.decode().removeprefix(PIN_PREFIX)] = manifest_from_text(value, what)
                case _:
                    raise DataIntegrity(f"{what} has no such field")
        except (DataIntegrity, UnicodeDecodeError) as error:
            damaged[name] = str(error)
    term = 0 if b"term" in damaged else int(fields.get(b"term", b"0"), 16)
    layout = "" if b"layout" in damaged else fields.get(b"layout", b"").decode()
    ascending = tuple(sorted(manifests, key=lambda manifest: manifest.version))
    return Head(shard, term, layout, ascending, pins, damaged)


def manifest_from_text(text: str | bytes, what: str) -> Manifest:
    """Read a manifest back; raises DataIntegrity, naming ``what``, if the text is none."""
    manifest = from_text(Manifest, text, what)
    for section in manifest.sections:
        if section.size_bytes < 0 or len(section.digests) != -(-section.size_bytes // CHUNK_BYTES):
            raise DataIntegrity(f"{what} cannot be read: section {section.name!r} has other chunks than bytes")
    return manifest
