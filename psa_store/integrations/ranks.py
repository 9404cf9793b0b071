"""How many ranks a job has, and how many steps an epoch: for loops that know it before there is a worker."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import DataLoader

from psa_store.config import load_settings
from psa_store.config.launcher import launched_world_size
from psa_store.errors import UsageError
from psa_store.job.change import batch_size_set
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.storage import RedisStore


def ranks_of(job: str) -> int:
    """The number that the job has, or that it will have if it is new and ``psa.Worker`` is given none."""
    settings, config = load_settings(), _stored(job)
    if config is not None:
        return config.ranks
    return settings.ranks or settings.default_ranks or launched_world_size() or 1


def refuse_set_batch_size(job: str, loader: DataLoader[Any], ranks: int) -> None:
    """Raise UsageError if `psa job set` gave the job another batch size than the loader's, which counts the epochs."""
    config = _stored(job)
    size = None if config is None else batch_size_set(config.changes)
    if size is not None and loader.batch_size is not None and size != loader.batch_size * ranks:
        raise UsageError(
            f"job {job} was set to batch_size={size}, and this loop counts its epochs by batches of "
            f"{loader.batch_size} on {ranks} ranks: `psa job set {job} batch_size={loader.batch_size * ranks}`"
        )


def _stored(job: str) -> JobConfig | None:
    settings = load_settings()
    if settings.draft is not None:
        return None
    with RedisStore.from_settings(settings) as store:
        stored = store.read_job(job)
    return None if stored is None else job_config_from_json(stored[0])


def epoch_steps(loader: DataLoader[Any], ranks: int) -> int:
    """Steps of a pass over the data: the last one may take samples of the next pass."""
    if loader.batch_size is None:
        samples, batch = len(loader.batch_sampler), ranks  # type: ignore[arg-type]
    else:
        samples, batch = len(loader.sampler), loader.batch_size * ranks  # type: ignore[arg-type]
    return max(1, samples // batch if loader.drop_last else math.ceil(samples / batch))
