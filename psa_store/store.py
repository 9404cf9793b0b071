"""Read any committed version of a job's parameters, from any program, while training goes on.

Needs Redis only: no ZooKeeper, no server, no model. Example::

    store = psa.Store("shakespeare")
    weights = store.state_dict()            # newest version that all shards have, as torch tensors
    embedding = store.get("wte.weight", version=store.versions()[0])    # numpy
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch

from psa_store.config import load_settings
from psa_store.errors import DataIntegrity, UnknownJob, UsageError
from psa_store.job.config import JobConfig, check_job_name, job_config_from_json
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import TensorRole, layout_from_json
from psa_store.logs import printable
from psa_store.optim.tensors import as_bytes, to_numpy, to_torch
from psa_store.storage import Head, RedisStore
from psa_store.storage.sections import PARAM

_ATTEMPTS = 5
"""Tries to read the newest version before giving up: each fails only if training replaced it three times meanwhile."""


class Store:
    """A reader of one job. Thread-safe.

    Args:
        job: name of the job.
        redis: URL of Redis; None takes ``PSA_REDIS``.

    Raises:
        UnknownJob: nothing is stored under this name.
        DependencyUnreachable: Redis does not answer.
    """

    def __init__(self, job: str, redis: str | None = None) -> None:
        settings = load_settings()
        url = redis or settings.redis
        if url is None:
            raise UsageError("psa.Store needs Redis: pass redis='redis://host:port' or set PSA_REDIS")
        self._job = check_job_name(job)
        self._store = RedisStore(url, timeout_s=settings.connect_timeout_s)
        found = self._store.read_job(job)
        if found is None:
            known = ", ".join(sorted(self._store.jobs())) or "none"
            self._store.close()
            raise UnknownJob(f"no job {job!r} in {printable(url)}; known jobs: {known}")
        self._config = job_config_from_json(found[0])
        self._layout = layout_from_json(found[1])
        self._by_name = {name: index for index, spec in enumerate(self._layout.tensors) for name in spec.names}

    @property
    def config(self) -> JobConfig:
        """The facts that were fixed when the job was created."""
        return self._config

    def names(self) -> list[str]:
        """Names of all parameters and persistent buffers, tied ones under each of their names."""
        return [name for spec in self._layout.tensors if spec.persistent for name in spec.names]

    def versions(self) -> list[int]:
        """The versions that can be read whole, ascending."""
        return self._common(self._heads())

    def version(self) -> int:
        """The newest version that can be read whole; raises DataIntegrity if there is none."""
        versions = self.versions()
        if not versions:
            raise DataIntegrity(f"job {self._job!r}: no version is common to all shards in Redis")
        return versions[-1]

    def get(self, name: str, version: int | None = None) -> npt.NDArray[Any]:
        """One parameter or buffer as a numpy array (bfloat16 comes as float32, which holds it exactly).

        Raises:
            UsageError: no such name, or no such version.
            DataIntegrity: the stored bytes are damaged.
        """
        if name not in self._by_name:
            raise UsageError(f"job {self._job!r} has no parameter {name!r}; see Store.names()")
        return to_numpy(self._read([self._by_name[name]], version)[self._by_name[name]])

    def arrays(self, version: int | None = None) -> dict[str, npt.NDArray[Any]]:
        """All parameters and persistent buffers of one version as numpy arrays."""
        return {name: to_numpy(tensor) for name, tensor in self.state_dict(version).items()}

    def state_dict(self, version: int | None = None) -> dict[str, torch.Tensor]:
        """All parameters and persistent buffers of one version, as ``load_state_dict`` takes them."""
        wanted = [i for i, spec in enumerate(self._layout.tensors) if spec.persistent]
        tensors = self._read(wanted, version)
        return {name: tensors[i] for i in wanted for name in self._layout.tensors[i].names}

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heads(self) -> dict[int, Head]:
        heads = self._store.heads(self._job, [shard.index for shard in self._layout.shards])
        return {head.shard: head for head in heads}

    def _common(self, heads: Mapping[int, Head]) -> list[int]:
        """Versions that every changing shard has; a job of frozen tensors only has version 0."""
        shards = self._layout.versioned
        versions = [{manifest.version for manifest in heads[shard.index].manifests} for shard in shards]
        return sorted(set.intersection(*versions)) if versions else [0]

    def _read(self, wanted: list[int], version: int | None) -> dict[int, torch.Tensor]:
        """Choose a version and read it; while training goes on it may be dropped meanwhile, then choose again."""
        attempt = 0
        while True:
            attempt += 1
            heads = self._heads()
            stored = self._common(heads)
            if version is None and not stored:
                raise DataIntegrity(f"job {self._job!r}: no version is common to all shards in Redis")
            chosen = stored[-1] if version is None else version
            if chosen not in stored:
                raise UsageError(f"job {self._job!r} has no version {chosen}; stored versions: {stored}")
            try:
                return self._read_version(wanted, chosen, heads)
            except DataIntegrity:
                if chosen in self.versions() or attempt == _ATTEMPTS:
                    raise  # it is still there: damaged, not dropped

    def _read_version(self, wanted: list[int], version: int, heads: Mapping[int, Head]) -> dict[int, torch.Tensor]:
        """Read the shards that hold ``wanted`` and cut the tensors out of them."""
        members = set(wanted)
        shards = [s for s in self._layout.shards if any(piece.tensor in members for piece in s.pieces)]
        specs = self._layout.tensors
        flat = {i: torch.empty(specs[i].numel, dtype=to_torch(specs[i].dtype)) for i in wanted}
        for shard in shards:
            manifest = heads[shard.index].manifest(0 if shard.role is TensorRole.FROZEN else version)
            if manifest is None:
                raise DataIntegrity(f"job {self._job!r}: shard {shard.index} has no version {version}")
            whole = torch.empty(shard.size_bytes, dtype=torch.uint8)
            self._store.load(self._job, shard.index, manifest, {PARAM: as_bytes(whole)})
            for piece in shard.pieces:
                if piece.tensor in members:
                    item = ITEM_BYTES[shard.dtype]
                    low = piece.shard_start * item
                    part = whole[low : low + piece.length * item].view(flat[piece.tensor].dtype)
                    flat[piece.tensor][piece.tensor_start : piece.tensor_start + piece.length] = part
        return {i: tensor.view(specs[i].shape) for i, tensor in flat.items()}
