"""Sections of a committed version, straight into memory, with their digests checked."""

from __future__ import annotations

from collections.abc import Mapping

from xxhash import xxh3_128_hexdigest

from psa_store.errors import DataIntegrity
from psa_store.storage.caller import Caller
from psa_store.storage.chunk_reader import read_into
from psa_store.storage.head import Manifest, split_chunks


def load_sections(caller: Caller, job: str, shard: int, manifest: Manifest, into: Mapping[str, memoryview]) -> None:
    """Read those sections of a shard for which there is memory.

    Raises:
        DataIntegrity: a chunk is missing, has another length or another digest; names it.
    """
    wanted: list[tuple[str, memoryview, str, str]] = []
    for section in manifest.sections:
        if section.name not in into:
            continue
        place = into[section.name].cast("B")
        where = f"job {job!r}, shard {shard}, version {manifest.version}, section {section.name}"
        if len(place) != section.size_bytes:
            raise DataIntegrity(f"{where}: {section.size_bytes} bytes stored, {len(place)} expected")
        for index, (part, digest) in enumerate(zip(split_chunks(place), section.digests, strict=True)):
            key = manifest.chunk_key(job, shard, section.name, index)
            wanted.append((key, part, digest, f"{where}, chunk {index}"))
    found = caller.retrying(lambda: read_into(caller.pool, [(key, part) for key, part, _, _ in wanted]))
    for (_, part, digest, where), problem in zip(wanted, found, strict=True):
        if problem:
            raise DataIntegrity(f"{where}: {problem}")
        if xxh3_128_hexdigest(part) != digest:
            raise DataIntegrity(f"{where}: damaged, its digest does not match")
