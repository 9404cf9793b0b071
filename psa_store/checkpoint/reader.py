"""The one way to read what Redis has stored of a job: open a version, then read tensors, parts of them, or sections.

Example::

    version = open_version(store, "shakespeare", "before-lr-change")    # or a number; None: the newest
    tensors = version.tensors([0, 3])                                   # by their index in the layout

The digest of every byte is checked before it is handed on. ``psa.Store``, torch's distributed checkpoints, exports, and
`psa checkpoint verify` and `diff` all read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from xxhash import xxh3_128

from psa_store.checkpoint.catalog import StoredJob, read_job
from psa_store.errors import DataIntegrity, UsageError
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, Shard, TensorRole, TensorSpec
from psa_store.job.model_files import ModelFiles
from psa_store.job.position import DataRecord
from psa_store.optim.slots import AVERAGE, wide_dtype
from psa_store.optim.tensors import as_bytes, to_torch
from psa_store.storage import Manifest, RedisStore
from psa_store.storage.sections import PARAM

_CHECKED_AT_ONCE = 4
_ATTEMPTS = 5
"""Tries to read the newest version before giving up: each fails only if training replaced it three times meanwhile."""


class Replaced(UsageError):
    """The version was dropped while it was read, as versions are that no checkpoint pins."""


@dataclass(frozen=True, slots=True)
class Region:
    """The elements of a tensor from ``start`` on, and flat memory for them."""

    tensor: int
    """Its index in the layout."""
    start: int
    flat: Tensor


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One version of all shards of a job. Thread-safe. The store stays the caller's.

    Methods that read raise Replaced if newer versions have replaced this one meanwhile, and DataIntegrity if the stored
    bytes are damaged or missing.
    """

    store: RedisStore
    config: JobConfig
    layout: Layout
    version: int
    manifests: Mapping[int, Manifest]
    """Of every shard, at ``version``; of frozen ones, at version 0."""
    pinned: bool = False
    """Whether a checkpoint keeps it; else it is dropped sooner or later while training goes on."""

    def read(self, shard: int, into: Mapping[str, memoryview]) -> None:
        """Read sections of a shard into memory of their size."""
        manifest = self.manifests[shard]
        try:
            self.store.load(self.config.name, shard, manifest, into)
        except DataIntegrity as error:
            (head,) = self.store.heads(self.config.name, [shard])
            if self.pinned or not head.term or head.names(manifest):
                raise
            raise Replaced(
                f"job {self.config.name!r}: version {self.version} was replaced by newer ones while it was read. "
                "Try again, or read a version that a checkpoint pins."
            ) from error

    def data_record(self) -> DataRecord | None:
        """How the job walks through its data, for another job that goes on from here; None if that is not known."""
        _, record = self.store.data_record(self.config.name).read()
        return None if record is None else record.known_to(())

    def model_files(self) -> ModelFiles | None:
        """The small files of the job's model; None if none are known."""
        return self.store.model_files(self.config.name).read()

    def sections(self, shard: int) -> dict[str, memoryview]:
        """All sections of a shard, by name."""
        found = {each.name: memoryview(bytearray(each.size_bytes)) for each in self.manifests[shard].sections}
        self.read(shard, found)
        return found

    def parameters(self, shard: Shard, section: str = PARAM) -> Tensor:
        """All elements of a shard, with the padding between its tensors; or of another section of it.

        The average of what no step has changed is the parameters themselves: of buffers, frozen ones, and version 0.
        """
        found = next((each for each in self.manifests[shard.index].sections if each.name == section), None)
        whole = torch.empty(shard.numel, dtype=to_torch(shard.dtype if found is None else found.dtype))
        if found is None and (section != AVERAGE or (shard.role is TensorRole.TRAINED and self.version > 0)):
            raise DataIntegrity(f"job {self.config.name!r}: shard {shard.index} at {self.version} lacks {section!r}")
        self.read(shard.index, {PARAM if found is None else section: as_bytes(whole)})
        return whole

    def check_average(self) -> None:
        """Raise UsageError if the job keeps no average."""
        if self.config.average is None:
            raise UsageError(
                f"job {self.config.name!r} keeps no average of its parameters; one begins with a job: "
                "psa.Worker(…, average=psa.ema(0.999))"
            )

    def fill(self, regions: Iterable[Region], section: str = PARAM) -> None:
        """Read what these regions want, shard by shard: each is read once, and only if it holds a part of one."""
        wanted: dict[int, list[Region]] = {}
        for region in regions:
            wanted.setdefault(region.tensor, []).append(region)
        for shard in self.layout.shards:
            parts = [
                (region, low, high, piece.shard_start - piece.tensor_start)
                for piece in shard.pieces
                for region in wanted.get(piece.tensor, ())
                if (low := max(piece.tensor_start, region.start))
                < (high := min(piece.tensor_start + piece.length, region.start + len(region.flat)))
            ]
            whole = self.parameters(shard, section) if parts else None
            for region, low, high, shift in parts:
                assert whole is not None
                region.flat[low - region.start : high - region.start] = whole[low + shift : high + shift]

    def tensors(self, wanted: Iterable[int], section: str = PARAM) -> dict[int, Tensor]:
        """Whole tensors, by their index in the layout.

        ``section``: AVERAGE for the average of those that are trained, in float32 at least, and the others as they are.

        Raises:
            UsageError: the job keeps no average.
        """
        if section == AVERAGE:
            self.check_average()
        specs = self.layout.tensors
        regions = [Region(i, 0, torch.empty(specs[i].numel, dtype=_dtype_of(specs[i], section))) for i in wanted]
        self.fill(regions, section)
        return {region.tensor: region.flat.view(specs[region.tensor].shape) for region in regions}

    def digest(self) -> str:
        """sha256 of all parameters, buffers and the whole optimizer state, to compare runs bit by bit."""
        total = hashlib.sha256()
        for shard, manifest in self.manifests.items():
            for name, data in sorted(self.sections(shard).items()):
                total.update(name.encode())
                total.update(data)
            total.update(json.dumps(manifest.scalars, sort_keys=True).encode())
        return total.hexdigest()


def _dtype_of(spec: TensorSpec, section: str) -> torch.dtype:
    averaged = section == AVERAGE and spec.role is TensorRole.TRAINED
    return to_torch(wide_dtype(spec.dtype) if averaged else spec.dtype)


def open_version(store: RedisStore, job: str, what: str | int | None = None) -> StoredVersion:
    """A checkpoint by its name, or a version that all shards have; None takes the newest.

    Raises:
        UnknownJob: there is no such job.
        UsageError: it has neither such a checkpoint nor such a version; the message lists those that it has.
        DataIntegrity: no version is common to all shards, or a shard lacks this one.
    """
    return version_of(store, read_job(store, job), what)


def version_of(store: RedisStore, job: StoredJob, what: str | int | None = None) -> StoredVersion:
    """The same for a job that was looked up already."""
    pinned = what in job.checkpoints
    return StoredVersion(store, job.config, job.layout, job.version_of(what), job.manifests(what), pinned)


def read_newest(
    store: RedisStore, job: str, wanted: Sequence[int], section: str = PARAM
) -> tuple[StoredVersion, dict[int, Tensor]]:
    """Tensors of the newest version, and which that is.

    Raises:
        UnknownJob: there is no such job.
        UsageError: it keeps no average, and that is wanted.
        DataIntegrity: the stored bytes are damaged, or training drops versions faster than they are read.
    """
    return read_tensors(store, read_job(store, job), None, wanted, section)


def read_tensors(
    store: RedisStore, job: StoredJob, what: str | int | None, wanted: Sequence[int], section: str = PARAM
) -> tuple[StoredVersion, dict[int, Tensor]]:
    """The same of any version. One that is dropped meanwhile while training goes on is chosen again."""
    for _ in range(_ATTEMPTS):
        with suppress(Replaced):
            version = version_of(store, job.reread(store), what)
            return version, version.tensors(wanted, section)
    raise DataIntegrity(f"job {job.config.name!r}: training drops versions faster than they are read: try again")


def find_damage(store: RedisStore, job: str, what: str | None) -> list[str]:
    """Read every byte of a checkpoint or a version (None: the newest): what is wrong, one sentence for each shard.

    Raises:
        UsageError: there is no such checkpoint or version.
        DataIntegrity: a shard lacks it.
    """
    version = open_version(store, job, what)

    def read(shard: int) -> str:
        try:
            version.sections(shard)
        except DataIntegrity as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(_CHECKED_AT_ONCE, thread_name_prefix="psa-verify") as readers:
        return [problem for problem in readers.map(read, version.manifests) if problem]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """xxh3 of the names and bits of CPU tensors, in the order of their names: what a process saw of a model."""
    total = xxh3_128()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(as_bytes(tensors[name].detach().contiguous().flatten()))
    return total.hexdigest()
