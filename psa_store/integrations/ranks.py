"""How many ranks a job has, for loops that must know the steps of an epoch before there is a worker."""

from __future__ import annotations

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
