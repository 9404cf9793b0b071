"""Whether Redis and ZooKeeper let a process of a job do what it will do: seen before it begins."""

from __future__ import annotations

from psa_store.config import Settings
from psa_store.coordination import Coordination
from psa_store.storage import RedisStore


def check_dependencies(settings: Settings, store: RedisStore, coordination: Coordination) -> None:
    """See it for a process that is started by itself; for those of `psa run` it was seen before they were started.

    Raises:
        DependencyUnreachable: one of them does not answer.
        DependencyUnfit: it refuses something, which the message names.
    """
    store.check()
    if settings.run is None:
        store.rehearse()
        coordination.rehearse()
