"""The Redis and the ZooKeeper that a command talks to: those of the settings, or the private ones that run here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from psa_store.config import Settings
from psa_store.coordination import Coordination
from psa_store.launch import fill_addresses
from psa_store.storage import RedisStore

if TYPE_CHECKING:
    from psa_store.observe import JobHistory


@contextmanager
def open_store(settings: Settings) -> Iterator[RedisStore]:
    """Raises DependencyUnreachable if no Redis is known."""
    settings = fill_addresses(settings)
    assert settings.redis is not None
    with closing(RedisStore(settings.redis, timeout_s=settings.connect_timeout_s)) as store:
        yield store


@contextmanager
def open_history(job: str, settings: Settings) -> Iterator[JobHistory]:
    """The history of a job, in the same Redis; raises DependencyUnreachable if none is known."""
    from psa_store.observe import JobHistory

    settings = fill_addresses(settings)
    assert settings.redis is not None
    with closing(JobHistory(job, settings.redis, timeout_s=settings.connect_timeout_s)) as history:
        yield history


@contextmanager
def open_coordination(job: str, settings: Settings, wake: Callable[[], None] = lambda: None) -> Iterator[Coordination]:
    """A session for a job; raises DependencyUnreachable if no ZooKeeper is known, or none answers."""
    settings = fill_addresses(settings)
    assert settings.zookeeper is not None
    coordination = Coordination(
        settings.zookeeper,
        job,
        session_timeout_s=settings.session_timeout_s,
        connect_timeout_s=settings.connect_timeout_s,
        wake=wake,
    )
    with closing(coordination):
        coordination.start()
        yield coordination
