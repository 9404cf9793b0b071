"""Read any committed version of a job's parameters, from any program, while training goes on.

Needs Redis only: no ZooKeeper, no server, no model. Example::

    store = psa.Store("shakespeare")
    weights = store.state_dict()            # newest version that all shards have, as torch tensors
    embedding = store.get("wte.weight", version=store.versions()[0])    # numpy
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from psa_store.checkpoint.catalog import read_job
from psa_store.checkpoint.reader import read_tensors
from psa_store.config import load_settings
from psa_store.errors import PsaError, UsageError
from psa_store.job.config import JobConfig, check_job_name
from psa_store.optim.slots import AVERAGE
from psa_store.optim.tensors import to_numpy
from psa_store.storage import RedisStore, known_redis
from psa_store.storage.sections import PARAM


class Store:
    """A reader of one job. Thread-safe.

    What it reads never goes back in time: after a failover that lost something, it waits for the servers of the job to
    write that again, as long as PSA_CONNECT_TIMEOUT_S, and raises DependencyUnfit if they do not.

    Args:
        job: name of the job.
        redis: URL of Redis; None takes ``PSA_REDIS``, or the Redis of `psa up`.

    Raises:
        UnknownJob: nothing is stored under this name.
        DependencyUnreachable: Redis does not answer.
    """

    def __init__(self, job: str, redis: str | None = None) -> None:
        settings = load_settings()
        self._store = RedisStore(
            redis or known_redis(settings), timeout_s=settings.connect_timeout_s, refuse_older=True
        )
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

    def get(self, name: str, version: int | str | None = None, *, average: bool = False) -> npt.NDArray[Any]:
        """One parameter or buffer as a numpy array (bfloat16 comes as float32, which holds it exactly).

        Args:
            version: a number, or the name of a checkpoint; None: the newest version.
            average: of a parameter that is trained, its average over the steps.

        Raises:
            UsageError: no such name, or no such version, or the job keeps no average.
            DataIntegrity: the stored bytes are damaged.
        """
        if name not in self._by_name:
            raise UsageError(f"job {self.config.name!r} has no parameter {name!r}; see Store.names()")
        index = self._by_name[name]
        return to_numpy(self._read([index], version, average=average)[index])

    def arrays(self, version: int | str | None = None, *, average: bool = False) -> dict[str, npt.NDArray[Any]]:
        """All parameters and persistent buffers of one version as numpy arrays; arguments as for :meth:`get`."""
        return {name: to_numpy(tensor) for name, tensor in self.state_dict(version, average=average).items()}

    def state_dict(self, version: int | str | None = None, *, average: bool = False) -> dict[str, torch.Tensor]:
        """All parameters and persistent buffers of one version, as ``load_state_dict`` takes them.

        Arguments as for :meth:`get`. An average is of float32 where parameters have less.
        """
        wanted = [i for i, spec in enumerate(self._layout.tensors) if spec.persistent]
        tensors = self._read(wanted, version, average=average)
        return {name: tensors[i] for i in wanted for name in self._layout.tensors[i].names}

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, wanted: list[int], version: int | str | None, *, average: bool) -> dict[int, torch.Tensor]:
        _, tensors = read_tensors(self._store, self._stored, version, wanted, AVERAGE if average else PARAM)
        return tensors
