"""A new job from an export: the same state, whatever the shard size, the world size and the number of servers.

The padding between tensors is zero, and places in the arena do not depend on the shard size. So the state of a shard is
put together from files tensor by tensor, however it was cut before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from psa_store.checkpoint.creation import right_to_create, write_new_job
from psa_store.checkpoint.files.export import verify_export
from psa_store.checkpoint.files.folder import Folder
from psa_store.checkpoint.files.manifest import Export
from psa_store.checkpoint.files.tensor_files import (
    LENGTH_BYTES,
    SUFFIX,
    Stored,
    header_bytes,
    param_key,
    rank_key,
    read_header,
    slot_key,
)
from psa_store.cluster import ProcessRole
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, JobBusy, JobMismatch, UsageError
from psa_store.job.config import JobConfig
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import Layout, Shard, TensorRole, make_layout
from psa_store.job.model_files import FILES_BYTES_MAX, ModelFiles
from psa_store.storage import RedisStore, ShardState
from psa_store.storage.sections import CLOCK, OPT_STEP, PARAM, RANK, SKIPPED


def import_export(
    export: Export,
    job: str,
    store: RedisStore,
    coordination: Coordination,
    *,
    ranks: int | None = None,
    shard_bytes: int | None = None,
    like: tuple[JobConfig, Layout] | None = None,
    restore: bool = False,
) -> JobConfig:
    """Create ``job`` with the state of an export; returns its facts.

    With the same shard size and ranks it goes on with the bits of the job that was exported; with another shard size,
    too, unless it clips by the global norm, which is summed shard by shard. Rank state (in rounds, and with top-k
    compression) is kept with the same shard size and ranks only, else they begin anew. Where pushes are applied on
    arrival, all of another number of ranks begin at the mean step of the old ones.

    An importer that dies meanwhile leaves no job behind, and may simply be run again.

    Args:
        coordination: of ``job``, started.
        ranks, shard_bytes: of the new job; None: as exported.
        like: a job that has the same tensors in other stages, or in none: the new one is cut as it is.
        restore: Redis has lost the job: write it again, be it that ZooKeeper knows it. The caller holds
            ``CREATOR_NODE``, and the export is one that ``newest_export`` has just read and found whole.

    Raises:
        UsageError: the job exists, or the export does not fit the arguments. JobMismatch: to restore, ZooKeeper's job
            must be the exported one. JobBusy: another process creates it, or its servers live and will write it again.
        DataIntegrity: a file is missing, torn or damaged.
        DependencyUnreachable: Redis, ZooKeeper or the file system fails.
    """
    layout = make_layout(export.layout.tensors, shard_bytes or export.layout.shard_bytes)
    config = replace(export.config, name=job, ranks=ranks or export.config.ranks)
    if like is not None:
        cut, layout = like
        _refuse_other_tensors(export, layout)
        config = replace(config, stages=cut.stages, microbatches=cut.microbatches)
    config = replace(config, layout=layout.fingerprint)
    source = Source(export, config, layout)
    _refuse_known(config, store, coordination, restore=restore)
    if not restore:
        verify_export(export)
    source.look()
    with nullcontext() if restore else right_to_create(job, "import", coordination):
        _refuse_known(config, store, coordination, restore=restore)
        states, files = source.states(), source.model_files()
        write_new_job(config, layout, source.version, states, store, coordination, export.data, files)
    coordination.create_config(config)
    return config


def _refuse_known(config: JobConfig, store: RedisStore, coordination: Coordination, *, restore: bool) -> None:
    job = config.name
    known = coordination.read_config()  # before Redis is asked: its documents are written first
    if store.has_job(job):
        raise UsageError(f"job {job!r} exists in Redis at {store.where}: import under another name")
    if known is None:
        return
    if not restore:
        raise UsageError(
            f"job {job!r} exists in ZooKeeper, but Redis at {store.where} has lost it: restore it with "
            "`psa run --restore`, or import under another name"
        )
    if isinstance(known, JobConfig) and known != config:
        config.must_agree_with(known)
        raise JobMismatch(f"job {job!r} has another model or shard size in ZooKeeper than in the export")
    servers = coordination.living(ProcessRole.SERVER)
    if servers:
        raise JobBusy(f"job {job!r}: servers live and write it again from memory: {', '.join(sorted(servers))}")


def _refuse_other_tensors(export: Export, layout: Layout) -> None:
    """Raise UsageError if a layout is not of the exported tensors, in whatever order and stages."""

    def described(of: Layout) -> dict[str, tuple[object, ...]]:
        return {
            min(spec.names): (sorted(spec.names), spec.shape, spec.dtype, spec.role, spec.group, spec.persistent)
            for spec in of.tensors
        }

    theirs, ours = described(export.layout), described(layout)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UsageError(
                f"{export.url}: {name} is not the same there and in the script: an export can be cut into other "
                "stages, but its tensors stay what they are"
            )


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes of a tensor of a file, and where in a section they belong."""

    stored: Stored
    low: int
    length: int
    place: int


class Source:
    """The shards of a new job with these facts and this layout, from the files of an export.

    Raises:
        UsageError: the export cannot be cut like that.
    """

    def __init__(self, export: Export, config: JobConfig, layout: Layout) -> None:
        self._export = export
        self._config = config
        self._layout = layout
        self._folder = Folder(export.url)
        self._stored: dict[str, Stored] = {}
        self._same_layout = layout.fingerprint == export.config.layout
        same_ranks = config.ranks == export.config.ranks
        self._as_it_was = self._same_layout and same_ranks
        self._clocks = export.clocks
        if export.clocks and not same_ranks:
            self._clocks = (export.step,) * config.ranks
        self.version = sum(self._clocks) if config.clocks else export.version
        self._exported = {
            name: (index, spec) for index, spec in enumerate(export.layout.tensors) for name in spec.names
        }
        """By name, each tensor and its index in the export."""
        self._scalars = {shard.index: self._scalars_of(shard) for shard in layout.shards}

    def look(self) -> None:
        """Find out where each tensor lies; raises DataIntegrity if one is missing or not as the job has it."""
        for file in self._export.files:
            if file.name.endswith(SUFFIX):
                where = f"{self._folder.url}/{file.name}"
                size = header_bytes(where, self._folder.read(file.name, 0, LENGTH_BYTES), file.size_bytes)
                text = self._folder.read(file.name, LENGTH_BYTES, LENGTH_BYTES + size)
                found = read_header(file.name, text, file.size_bytes)
                if twice := found.keys() & self._stored.keys():
                    raise DataIntegrity(f"{where}: tensor {min(twice)!r} is in another file as well")
                self._stored |= found
        for shard in self._layout.shards:
            self._sections(shard)

    def model_files(self) -> ModelFiles | None:
        """The files that are beside the tensors; None if there are none."""
        sizes = {file.name: file.size_bytes for file in self._export.files if file.name in self._export.model_files}
        if sum(sizes.values()) > FILES_BYTES_MAX:
            raise DataIntegrity(f"{self._export.url}: the files beside its tensors are longer than {FILES_BYTES_MAX:,}")
        contents = {name: self._folder.read(name, 0, size) for name, size in sizes.items()}
        return ModelFiles(contents) if contents else None

    def states(self) -> Iterator[ShardState]:
        """All shards; each is read when it is asked for."""
        for shard in self._layout.shards:
            arrays = {
                name: (parts[0].stored.dtype, self._read(shard.numel * ITEM_BYTES[parts[0].stored.dtype], parts))
                for name, parts in self._sections(shard).items()
            }
            yield ShardState(shard.index, {**arrays, **self._ranks(shard)}, self._scalars[shard.index], expect=None)

    def _sections(self, shard: Shard) -> Mapping[str, list[_Part]]:
        """Of what each section but those of ranks is made."""
        sections: dict[str, list[_Part]] = {}
        for piece in shard.pieces:
            _, spec = self._exported[self._layout.tensors[piece.tensor].name]
            keys = {PARAM: param_key(spec), **{slot: slot_key(slot, spec) for slot in self._export.slots}}
            for section, key in keys.items():
                stored = self._stored.get(key)
                if section == PARAM or (stored is not None and shard.role is TensorRole.TRAINED):
                    parts = sections.setdefault(section, [])
                    dtype = spec.dtype if section == PARAM else parts[0].stored.dtype if parts else None
                    if stored is None or stored.shape != spec.shape or stored.dtype != (dtype or stored.dtype):
                        raise DataIntegrity(
                            f"{self._export.url}: tensor {key!r} is missing, or has another shape or dtype"
                        )
                    item = ITEM_BYTES[stored.dtype]
                    low = stored.low + piece.tensor_start * item
                    parts.append(_Part(stored, low, piece.length * item, piece.shard_start * item))
        return sections

    def _ranks(self, shard: Shard) -> Mapping[str, tuple[str, memoryview]]:
        """Rank state, where that still has a meaning."""
        if not self._as_it_was or not self._config.keeps_rank_state:
            return {}
        found = {f"{RANK}{rank}": rank_key(f"{RANK}{rank}", shard.index) for rank in range(self._config.ranks)}
        stored = {section: self._stored[key] for section, key in found.items() if key in self._stored}
        return {
            section: (its.dtype, self._read(its.high - its.low, [_Part(its, its.low, its.high - its.low, 0)]))
            for section, its in stored.items()
        }

    def _read(self, size_bytes: int, parts: list[_Part]) -> memoryview:
        """Memory of a section; what lies side by side in a file is read at once."""
        section = bytearray(size_bytes)
        for some in _neighbours(parts):
            name, low, high = some[0].stored.file, some[0].low, some[-1].low + some[-1].length
            data = memoryview(self._folder.read(name, low, high))
            if len(data) != high - low:
                raise DataIntegrity(f"{self._export.url}/{name}: it has become shorter meanwhile")
            for part in some:
                section[part.place : part.place + part.length] = data[part.low - low :][: part.length]
        return memoryview(section)

    def _scalars_of(self, shard: Shard) -> Mapping[str, float | int]:
        if self._same_layout:
            scalars = dict(self._export.scalars[shard.index])
        else:
            former = [self._export.scalars[old.index] for old in self._export.layout.shards_of(shard.role)]
            alike = [
                {name: value for name, value in each.items() if not name.startswith((CLOCK, SKIPPED))}
                for each in former
            ]
            if any(each != alike[0] for each in alike):
                raise UsageError(
                    f"{self._export.url}: its shards have had different numbers of updates ({OPT_STEP}), so they "
                    f"cannot be cut anew: import it with {self._export.layout.shard_bytes} bytes a shard"
                )
            scalars = dict(alike[0])
            for piece in shard.pieces:
                index, _ = self._exported[self._layout.tensors[piece.tensor].name]
                name = f"{SKIPPED}{index}"
                scalars |= {f"{SKIPPED}{piece.tensor}": each[name] for each in former if name in each}
        if not scalars:
            return scalars  # never updated, as when it was created
        scalars = {name: value for name, value in scalars.items() if not name.startswith(CLOCK)}
        return {**scalars, **{f"{CLOCK}{rank}": clock for rank, clock in enumerate(self._clocks)}}


def _neighbours(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """The parts in runs that lie side by side in one file."""
    run: list[_Part] = []
    for part in parts:
        if run and (part.stored.file != run[-1].stored.file or part.low != run[-1].low + run[-1].length):
            yield run
            run = []
        run.append(part)
    if run:
        yield run
