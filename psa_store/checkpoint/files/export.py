"""One version of a job as a folder: safetensors, what loaders of the model want beside them, and ``psa.json``.

``psa.json`` is written last. It says what the job is, which version this is, and how long each file is and its digest.
A folder without it is no export; one whose files are not as it says is damaged. It carries the digest of itself.

A folder is written once. All files are whole and on the disk under temporary names before the first gets its own, so
an exporter that dies in between leaves what the next one recognises and removes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime

from xxhash import xxh3_128_hexdigest

from psa_store.checkpoint.files.folder import Draft, FileFacts, Folder, is_temporary
from psa_store.checkpoint.files.manifest import MANIFEST, Export, export_from_json
from psa_store.checkpoint.files.tensor_files import (
    MODEL,
    OPTIMIZER,
    FileSpec,
    index_of,
    slots_of,
    split_average_into_files,
    split_into_files,
)
from psa_store.checkpoint.reader import StoredVersion
from psa_store.errors import DataIntegrity, PsaError, UsageError
from psa_store.job.model_files import ModelFiles
from psa_store.storage.sections import CLOCK

MAX_FILE_BYTES = 5_000_000_000
_MANIFEST_BYTES_MAX = 256 << 20
"""Enough for half a million tensors."""
_READERS = 2
"""Threads that read from Redis while what was read before is written: two, so that one checks digests meanwhile."""


def export_version(version: StoredVersion, url: str, max_file_bytes: int = MAX_FILE_BYTES) -> Export:
    """Write a version into a new folder.

    Holds three sections of shards in memory, never the whole model.

    Args:
        url: a path or any URL of fsspec; a folder that does not exist, or is empty.
        max_file_bytes: a part of the state that is larger is shared out to several files with an index.

    Raises:
        UsageError: there is something in the folder; or shards of this version hold the pushes of different steps.
        DataIntegrity: what Redis has is damaged.
        DependencyUnreachable: Redis or the file system fails.
    """
    sections = {shard: manifest.sections for shard, manifest in sorted(version.manifests.items())}
    planned = split_into_files(version.layout, sections, max_file_bytes)
    clocks, beside = _clocks(version), version.model_files()
    folder = Folder(url)
    _prepare(folder)
    with ExitStack() as stack:
        drafts = _draft(version, planned, beside, folder, stack)
        export = Export(
            folder.url,
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            version.config,
            version.layout,
            version.version,
            clocks,
            tuple(version.manifests[shard.index].scalars for shard in version.layout.shards),
            tuple(slots_of(sections)),
            tuple(draft.facts for draft in drafts),
            origin_of(version),
            version.data_record(),
        )
        last = stack.enter_context(folder.draft(MANIFEST))
        last.write(export.to_json().encode())
        last.finish()
        # The folder is synced in between: psa.json must not be there without what it names.
        folder.publish(drafts)
        folder.publish([last])
    return export


def export_average(version: StoredVersion, url: str, max_file_bytes: int = MAX_FILE_BYTES) -> list[FileFacts]:
    """Write the average of the parameters, and the buffers of the version, as files of a model into a new folder.

    They are what ``from_pretrained`` and ``load_state_dict`` take. No job can go on from them: there is no manifest.
    Arguments and errors as of :func:`export_version`; also UsageError if the job keeps no average.
    """
    version.check_average()
    sections = {shard: manifest.sections for shard, manifest in sorted(version.manifests.items())}
    planned = split_average_into_files(version.layout, sections, max_file_bytes)
    beside = version.model_files()
    folder = Folder(url)
    _prepare(folder)
    with ExitStack() as stack:
        drafts = _draft(version, planned, beside and beside.without_dtype(), folder, stack)
        folder.publish(drafts)
    return [draft.facts for draft in drafts]


def origin_of(version: StoredVersion) -> str:
    """A digest that no other content has: a name may be used again, a version be made again, but not a commit."""
    commits = [(shard, each.version, each.term, each.nonce) for shard, each in sorted(version.manifests.items())]
    return xxh3_128_hexdigest(json.dumps([version.version, commits]).encode())


def open_export(url: str) -> Export:
    """The export in a folder, its manifest checked, but not its files.

    Raises:
        UsageError: there is none.
        DataIntegrity: its manifest is damaged.
    """
    folder = Folder(url)
    if MANIFEST not in folder.names():
        raise UsageError(
            f"{url}: no {MANIFEST} in it, so it is no export, or one of an average alone, or was not finished. "
            "Files of other programs cannot be imported: load them into the model, and begin a new job with it."
        )
    return _read_manifest(folder, MANIFEST)


def _read_manifest(folder: Folder, name: str) -> Export:
    """That in a file of this name; raises DataIntegrity if it is none."""
    text = folder.read(name, 0, _MANIFEST_BYTES_MAX + 1)
    if len(text) > _MANIFEST_BYTES_MAX:
        raise DataIntegrity(f"{folder.url}: {name} is longer than {_MANIFEST_BYTES_MAX:,} bytes")
    return export_from_json(folder.url, text)


def verify_export(export: Export) -> None:
    """Read all files; raises DataIntegrity, naming the first that is missing, torn or damaged."""
    folder = Folder(export.url)
    there = set(folder.names())
    for expected in export.files:
        where = f"{export.url}/{expected.name}"
        if expected.name not in there:
            raise DataIntegrity(f"{where}: is missing")
        found = folder.facts(expected.name)
        if found.size_bytes != expected.size_bytes:
            raise DataIntegrity(f"{where}: {found.size_bytes} bytes long, written were {expected.size_bytes}")
        if found.xxh3_128 != expected.xxh3_128:
            raise DataIntegrity(f"{where}: damaged, its digest does not match")


def is_ours(name: str) -> bool:
    """Whether a file may be one of an export, or what is left of one, as far as its name tells."""
    return name.startswith((MODEL, OPTIMIZER, MANIFEST))


def ours_in(folder: Folder) -> set[str]:
    """The files of an export, or what is left of one: files have no names before a manifest, or its draft, is whole."""
    names = folder.names()
    ours = {name for name in names if is_ours(name) or is_temporary(name)}
    for name in names:
        if name.startswith(MANIFEST):
            with suppress(DataIntegrity):
                ours |= {file.name for file in _read_manifest(folder, name).files}
    return ours & set(names)


def list_exports(url: str, job: str | None = None) -> tuple[list[Export], list[tuple[str, str]]]:
    """The exports in a folder and in the folders in it, the one written last first; their files are not looked at.

    Args:
        job: look at exports of this job only; None: at all.

    Returns:
        They, and each folder that was passed over because it is damaged or not finished, with the reason.
    """
    top = Folder(url)
    passed, found = [], []
    for folder in [top, *top.folders()]:
        names = folder.names()
        if MANIFEST in names:
            try:
                found.append(_read_manifest(folder, MANIFEST))
            except PsaError as error:
                passed.append((folder.url, str(error)))
        elif any(is_ours(name) for name in names):
            passed.append((folder.url, f"{folder.url}: no {MANIFEST} in it, so it was not finished"))
    mine = [export for export in found if job is None or export.config.name == job]
    return sorted(mine, key=lambda each: each.created, reverse=True), passed


def newest_export(url: str, job: str | None = None) -> tuple[Export | None, list[tuple[str, str]]]:
    """The undamaged export that was written last, all its files read; None if there is none.

    Not the highest version: a job that went back to an older one and went on from there has a new history, and that
    counts. Arguments and what was passed over: see :func:`list_exports`.
    """
    found, passed = list_exports(url, job)
    for export in found:
        try:
            verify_export(export)
            return export, passed
        except PsaError as error:
            passed.append((export.url, str(error)))
    return None, passed


def _clocks(version: StoredVersion) -> tuple[int, ...]:
    """The clocks that all shards have."""
    if not version.config.clocks:
        return ()
    found = {
        tuple(int(manifest.scalars.get(f"{CLOCK}{rank}", 0)) for rank in range(version.config.ranks))
        for manifest in (version.manifests[shard.index] for shard in version.layout.versioned)
    }
    if len(found) > 1:
        raise UsageError(
            f"job {version.config.name!r}: the shards of version {version.version} hold the pushes of different steps, "
            f"as they may in mode {version.config.mode}. Export a checkpoint: it is cut between two steps."
        )
    return found.pop() if found else (0,) * version.config.ranks


def _prepare(folder: Folder) -> None:
    """Have an empty folder: only what an exporter left that died is removed."""
    names = folder.names()
    # All files are drafts until the manifest is one, too: then some may have been given their names already.
    died_last = any(is_temporary(name) and name.startswith(MANIFEST) for name in names)
    left = ours_in(folder) - {MANIFEST} if died_last else {name for name in names if is_temporary(name)}
    others = sorted(set(names) - left)
    if MANIFEST in names or others:
        raise UsageError(f"{folder.url}: {others[0]!r} is in it. Export into a new folder.")
    for name in left:
        folder.remove(name)
    folder.make()


def _draft(
    version: StoredVersion, planned: Sequence[FileSpec], beside: ModelFiles | None, folder: Folder, stack: ExitStack
) -> list[Draft]:
    """Write all files, and the index of those that are parts, under temporary names."""
    drafts = []
    for file in planned:
        draft = stack.enter_context(folder.draft(file.name))
        draft.write(file.header())
        for data in _contents(version, file):
            draft.write(data)
        draft.finish()
        drafts.append(draft)
    found = [index for stem in (MODEL, OPTIMIZER) if (index := index_of(planned, stem))]
    small = dict(beside.contents) if beside else {}
    for name, content in (small | {name: text.encode() for name, text in found}).items():
        drafts.append(stack.enter_context(folder.draft(name)))
        drafts[-1].write(content)
        drafts[-1].finish()
    return drafts


def _contents(version: StoredVersion, file: FileSpec) -> Iterator[memoryview]:
    """The bytes of all tensors of a file, in order; each is to be used before the next is taken."""
    reads = file.reads()
    sizes = [
        next(each.size_bytes for each in version.manifests[shard].sections if each.name == section)
        for shard, section, _ in reads
    ]
    places = [memoryview(bytearray(max(sizes, default=0))) for _ in range(_READERS + 1)]

    def read(number: int) -> memoryview:
        shard, section, _ = reads[number]
        place = places[number % len(places)][: sizes[number]]
        version.read(shard, {section: place})
        return place

    with ThreadPoolExecutor(_READERS, thread_name_prefix="psa-export") as readers:
        coming: dict[int, Future[memoryview]] = {}
        for number, (_, _, cuts) in enumerate(reads):
            asked = range(number + len(coming), min(number + len(places), len(reads)))
            coming.update({ahead: readers.submit(read, ahead) for ahead in asked})
            whole = coming.pop(number).result()
            for cut in cuts:
                yield whole[cut.low : cut.high]
