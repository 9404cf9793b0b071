"""Where Redis and ZooKeeper are: the environment says it, else `psa up` (or a `psa run` with private servers) does."""

from __future__ import annotations

from psa_store.config import Settings
from psa_store.errors import UsageError
from psa_store.launch.up import running


def fill_addresses(settings: Settings) -> Settings:
    """Settings with both addresses; raises UsageError if they are not known."""
    if settings.redis is not None and settings.zookeeper is not None:
        return settings
    found = running(settings.home)
    if found is None:
        raise UsageError(
            f"no private servers run in {settings.home}: `psa up` starts them, "
            "or set PSA_REDIS and PSA_ZOOKEEPER to your own"
        )
    return settings.model_copy(
        update={
            "redis": settings.redis or found.redis,
            "zookeeper": settings.zookeeper or found.zookeeper,
        }
    )
