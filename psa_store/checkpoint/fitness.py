"""Whether Redis and ZooKeeper let a process of a job do what it will do: seen before it begins."""

from __future__ import annotations

from psa_store.config import Settings
from psa_store.coordination import Coordination
from psa_store.storage import RedisStore


def start_with(settings: Settings, store: RedisStore, coordination: Coordination) -> None:
    """See that Redis answers, connect to ZooKeeper, and, in a process that is started by itself, try what it will do.

    For processes of `psa run` that was tried before they were started.

    Raises:
        DependencyUnreachable: one of them does not answer.
        DependencyUnfit: it refuses something, which the message names.
    """
    store.check()
    if settings.run is None:
        store.rehearse()
    coordination.start()
    if settings.run is None:
        coordination.rehearse()
