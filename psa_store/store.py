"""Read any committed version of a job's parameters, from any program, while training goes on.

Needs Redis only: no ZooKeeper, no server, no model. Example::

    store = psa.Store("shakespeare")
    weights = store.state_dict()            # newest version that all shards have, as torch tensors
    embedding = store.get("wte.weight", version=store.versions()[0])    # numpy
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy.typing as npt
import torch

from psa_store.checkpoint.catalog import read_job
from psa_store.checkpoint.reader import Replaced, version_of
from psa_store.config import load_settings
from psa_store.errors import DataIntegrity, PsaError, UsageError
from psa_store.job.config import JobConfig, check_job_name
from psa_store.optim.tensors import to_numpy
from psa_store.storage import RedisStore, known_redis

_ATTEMPTS = 5
"""Tries to read the newest version before giving up: each fails only if training replaced it three times meanwhile."""


class Store:
    """A reader of one job. Thread-safe.

    Args:
        job: name of the job.
        redis: URL of Redis; None takes ``PSA_REDIS``, or the Redis of `psa up`.

    Raises:
        UnknownJob: nothing is stored under this name.
        DependencyUnreachable: Redis does not answer.
    """

    def __init__(self, job: str, redis: str | None = None) -> None:
        settings = load_settings()
        self._store = RedisStore(redis or known_redis(settings), timeout_s=settings.connect_timeout_s)
        try:
            self._stored = read_job(self._store, check_job_name(job))
        except PsaError:
            self._store.close()
            raise
        self._layout = self._stored.layout
        self._by_name = {name: index for index, spec in enumerate(self._layout.tensors) for name in spec.names}

    @property
    def config(self) -> JobConfig:
        """The facts that were fixed when the job was created."""
        return self._stored.config

    def names(self) -> list[str]:
        """Names of all parameters and persistent buffers, tied ones under each of their names."""
        return [name for spec in self._layout.tensors if spec.persistent for name in spec.names]

    def versions(self) -> list[int]:
        """The versions that can be read whole, ascending."""
        return self._stored.reread(self._store).versions()

    def version(self) -> int:
        """The newest version that can be read whole; raises DataIntegrity if there is none."""
        return self._stored.reread(self._store).version_of(None)

    def get(self, name: str, version: int | None = None) -> npt.NDArray[Any]:
        """One parameter or buffer as a numpy array (bfloat16 comes as float32, which holds it exactly).

        Raises:
            UsageError: no such name, or no such version.
            DataIntegrity: the stored bytes are damaged.
        """
        if name not in self._by_name:
            raise UsageError(f"job {self.config.name!r} has no parameter {name!r}; see Store.names()")
        index = self._by_name[name]
        return to_numpy(self._read([index], version)[index])

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

    def _read(self, wanted: list[int], version: int | None) -> dict[int, torch.Tensor]:
        """Read tensors; the newest version may be dropped meanwhile while training goes on, then choose again."""
        for _ in range(_ATTEMPTS):
            with suppress(Replaced):
                return version_of(self._store, self._stored.reread(self._store), version).tensors(wanted)
        raise DataIntegrity(f"job {self.config.name!r}: training drops versions faster than they are read: try again")
