"""torch.distributed.checkpoint against a psa job: ``dcp.load`` reads its parameters, ``dcp.save`` begins a job.

Example::

    dcp.load(model.state_dict(), storage_reader=PsaReader("shakespeare"))       # newest version, also of a live job

    writer = PsaWriter("finetune", model, optimizer=psa.optim.AdamW(lr=1e-5), ranks=2)
    dcp.save(model.state_dict(), storage_writer=writer)                         # version 0 of a new job
    with psa.Worker("finetune", model, optimizer=psa.optim.AdamW(lr=1e-5)) as worker: ...

Names are those of ``state_dict``, at its top level. Both work in one process and in many, with tensors that are whole
or sharded. Only tensors are read and written; state of an optimizer stays with the job. What raises inside of dcp comes
out as its CheckpointException, which quotes our message.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from psa_store.checkpoint.creation import right_to_create, write_new_job
from psa_store.checkpoint.reader import Region, open_version
from psa_store.config import Settings, load_settings
from psa_store.coordination import Coordination
from psa_store.errors import UsageError
from psa_store.job.average import Average
from psa_store.job.config import check_job_name
from psa_store.job.layout import TensorSpec, make_layout
from psa_store.job.mode import parse_mode
from psa_store.optim import Optimizer
from psa_store.optim.tensors import as_bytes, to_torch
from psa_store.storage import RedisStore, ShardState
from psa_store.storage.sections import PARAM
from psa_store.worker.creation import Wanted, new_config
from psa_store.worker.flat_model import describe_model


class PsaReader(StorageReader):
    """Parameters and persistent buffers of one version of a job. For one ``dcp.load`` at a time; holds no connection.

    Of many processes, the coordinator chooses the version, and each reads the shards that it needs, one at a time.

    Args:
        job: its name.
        version: None: the newest that all shards have when it is loaded.
        redis: URL of Redis; None takes ``PSA_REDIS``.

    Raises:
        UnknownJob, UsageError: there is no such job or version.
        DependencyUnreachable: Redis does not answer.
    """

    def __init__(self, job: str, version: int | None = None, redis: str | None = None) -> None:
        self._job = check_job_name(job)
        self._version = version
        self._settings = _with_redis(load_settings(), redis)
        with RedisStore.from_settings(self._settings) as store:
            self._layout = open_version(store, job, version).layout

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        _refuse_id(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for spec in self._layout.tensors:
            size = torch.Size(spec.shape)
            whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            facts = TensorStorageMetadata(TensorProperties(dtype=to_torch(spec.dtype)), size, [whole])
            if spec.persistent:
                tensors |= dict.fromkeys(spec.names, facts)
        return Metadata(tensors, planner_data={name: (name,) for name in tensors})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is held."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        with RedisStore.from_settings(self._settings) as store:
            chosen = open_version(store, self._job, self._version).version
        return [replace(plan, storage_data=chosen) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_name = {name: index for index, spec in enumerate(self._layout.tensors) for name in spec.names}
        blocks = []
        for item in plan.items:
            if item.type is not LoadItemType.TENSOR:
                raise UsageError(f"{item.dest_index.fqn}: is no tensor; a psa job holds tensors only")
            index = by_name[item.storage_index.fqn]
            blocks.append(_block(item, index, self._layout.tensors[index]))
        with RedisStore.from_settings(self._settings) as store:
            version = open_version(store, self._job, plan.storage_data)
            if version.layout.fingerprint != self._layout.fingerprint:
                raise UsageError(f"job {self._job!r} is another one than when PsaReader was made: make a new one")
            version.fill(block.region for block in blocks)
        for block in blocks:
            target = planner.resolve_tensor(block.item).detach()
            target.copy_(block.region.flat.as_strided(tuple(block.item.lengths), block.strides))
            planner.commit_tensor(block.item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class _Block:
    """What an item asks for: a block of a tensor, inside the region from its first element to its last."""

    item: ReadItem
    strides: tuple[int, ...]
    region: Region


def _block(item: ReadItem, index: int, spec: TensorSpec) -> _Block:
    strides = tuple(math.prod(spec.shape[dim + 1 :]) for dim in range(len(spec.shape)))
    start = sum(offset * stride for offset, stride in zip(item.storage_offsets, strides, strict=True))
    last = start + sum((length - 1) * stride for length, stride in zip(item.lengths, strides, strict=True))
    count = last + 1 - start if all(item.lengths) else 0
    return _Block(item, strides, Region(index, start, torch.empty(count, dtype=to_torch(spec.dtype))))


class PsaWriter(StorageWriter):
    """Begins a job with the tensors that ``dcp.save`` is given; a ``psa.Worker`` of this name then goes on with them.

    Of many processes, the coordinator gathers the parameters, and creates the job.

    Args:
        job: its name; there must be none of this name.
        model: as the workers will have it. Its parameters and persistent buffers come from ``dcp.save``, under their
            names; buffers that are not in its ``state_dict`` are taken from it.
        optimizer, ranks, seed, mode, shard_bytes, average: as for ``psa.Worker``, which must be given the same.
        redis: URL of Redis; None takes ``PSA_REDIS``. ZooKeeper is that of ``PSA_ZOOKEEPER``.

    Raises:
        UsageError: the job exists, or it is not said where ZooKeeper is.
        DependencyUnreachable: Redis does not answer.
    """

    def __init__(
        self,
        job: str,
        model: nn.Module,
        *,
        optimizer: Optimizer,
        ranks: int | None = None,
        seed: int = 0,
        mode: str | None = None,
        shard_bytes: int | None = None,
        average: Average | None = None,
        redis: str | None = None,
    ) -> None:
        self._settings = _with_redis(load_settings(), redis)
        if self._settings.zookeeper is None:
            raise UsageError("PsaWriter needs ZooKeeper: set PSA_ZOOKEEPER")
        self._model = model
        self._layout = make_layout(describe_model(model, optimizer.group_of), shard_bytes)
        wanted = Wanted(
            name=check_job_name(job),
            ranks=ranks,
            seed=seed,
            optimizer=optimizer.to_dict(),
            layout=self._layout.fingerprint,
            mode=None if mode is None else parse_mode(mode),
            average=average,
        )
        self._config = new_config(wanted, self._settings)
        with RedisStore.from_settings(self._settings) as store:
            self._refuse_known(store)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        _refuse_id(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is held."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO:
                raise UsageError(f"{item.index.fqn}: is no tensor; a psa job holds tensors only: leave it out")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Bring the parts to the coordinator: dcp gathers results."""
        results = []
        for item in plan.items:
            assert item.tensor_data is not None
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            part = tensor.detach().cpu().contiguous()
            offsets = tuple(item.tensor_data.chunk.offsets)
            results.append(WriteResult(item.index, part.nbytes, (offsets, part)))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors = self._assembled(metadata, [result for some in results for result in some])
        with (
            RedisStore.from_settings(self._settings) as store,
            Coordination.from_settings(self._settings, self._config.name) as coordination,
        ):
            store.check()
            with right_to_create(self._config.name, "dcp", coordination):
                self._refuse_known(store)
                if coordination.read_config() is not None:
                    raise UsageError(f"job {self._config.name!r} exists in ZooKeeper: use another name")
                write_new_job(self._config, self._layout, 0, self._states(tensors), store, coordination)
            coordination.create_config(self._config)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def _refuse_known(self, store: RedisStore) -> None:
        if store.has_job(self._config.name):
            raise UsageError(f"job {self._config.name!r} exists in Redis at {store.where}: use another name")

    def _assembled(self, metadata: Metadata, results: Sequence[WriteResult]) -> list[Tensor]:
        """Every tensor of the layout, whole.

        Raises:
            UsageError: one is missing, has another shape or dtype, or is not in the model.
        """
        parts: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
        for result in results:
            parts.setdefault(result.index.fqn, []).append(result.storage_data)
        known = {name for spec in self._layout.tensors for name in spec.names}
        if unknown := sorted(metadata.state_dict_metadata.keys() - known):
            raise UsageError(f"{unknown[0]!r} is not in the model; give dcp.save what model.state_dict() gives")
        tensors = []
        for spec in self._layout.tensors:
            dtype = to_torch(spec.dtype)
            if not spec.persistent:
                tensors.append(self._model.get_buffer(spec.name).detach().cpu())
                continue
            name = next((name for name in spec.names if name in parts), None)
            if name is None:
                raise UsageError(f"{spec.name!r} is in the model, but dcp.save was not given it")
            facts = metadata.state_dict_metadata[name]
            assert isinstance(facts, TensorStorageMetadata)
            if tuple(facts.size) != spec.shape or facts.properties.dtype is not dtype:
                was = f"{facts.properties.dtype} of {tuple(facts.size)}"
                raise UsageError(f"{name!r}: dcp.save was given {was}, the model has {dtype} of {spec.shape}")
            whole = torch.empty(spec.shape, dtype=dtype)
            for offsets, part in parts[name]:
                low_high = zip(offsets, part.shape, strict=True)
                whole[tuple(slice(low, low + length) for low, length in low_high)] = part
            tensors.append(whole)
        return tensors

    def _states(self, tensors: Sequence[Tensor]) -> Iterator[ShardState]:
        for shard in self._layout.shards:
            data = torch.zeros(shard.numel, dtype=to_torch(shard.dtype))
            for piece in shard.pieces:
                flat = tensors[piece.tensor].flatten()
                part = flat[piece.tensor_start : piece.tensor_start + piece.length]
                data[piece.shard_start : piece.shard_start + piece.length] = part
            yield ShardState(shard.index, {PARAM: (shard.dtype, as_bytes(data))}, {}, expect=None)


def _with_redis(settings: Settings, redis: str | None) -> Settings:
    return settings.model_copy(update={"redis": redis or settings.redis})


def _refuse_id(checkpoint_id: str | os.PathLike[str] | None) -> None:
    if checkpoint_id is not None:
        raise UsageError(f"checkpoint_id={checkpoint_id!r}: the job's name says where; give no checkpoint_id")


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
