"""How many ranks a job has, and how many steps an epoch: for loops that know it before there is a worker."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.data import DataLoader

from psa_store.config import load_settings
from psa_store.config.launcher import launched_world_size
from psa_store.job.config import job_config_from_json
from psa_store.storage import RedisStore


def ranks_of(job: str) -> int:
    """The number that the job has, or that it will have if it is new and ``psa.Worker`` is given none."""
    settings = load_settings()
    if settings.draft is None:
        with RedisStore.from_settings(settings) as store:
            stored = store.read_job(job)
        if stored is not None:
            return job_config_from_json(stored[0]).ranks
    return settings.ranks or settings.default_ranks or launched_world_size() or 1


def epoch_steps(loader: DataLoader[Any], ranks: int) -> int:
    """Steps of a pass over the data: the last one may take samples of the next pass."""
    if loader.batch_size is None:
        samples, batch = len(loader.batch_sampler), ranks  # type: ignore[arg-type]
    else:
        samples, batch = len(loader.sampler), loader.batch_size * ranks  # type: ignore[arg-type]
    return max(1, samples // batch if loader.drop_last else math.ceil(samples / batch))
