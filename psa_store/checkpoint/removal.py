"""Removing a job for good: every key of Redis and every znode that is its own.

Nothing may run on it, and nothing begins meanwhile: the remover holds what a run holds, and the right to create. Redis
goes first. If the remover dies in between, the job is still known to one of the two, and can be removed again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from psa_store.checkpoint.catalog import FORK_PREFIX, read_job, sweep
from psa_store.checkpoint.creation import right_to_create
from psa_store.cluster import ProcessRole
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, JobBusy, UnknownJob, UsageError
from psa_store.job.config import RUN_NODE
from psa_store.job.layout import layout_from_json
from psa_store.storage import RedisStore

_HELD = 2
"""Znodes of the remover itself."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed."""

    keys: int
    size_bytes: int
    znodes: int


def check_removable(store: RedisStore, coordination: Coordination, job: str) -> None:
    """Raise if the job must stay.

    Raises:
        UnknownJob: neither Redis nor ZooKeeper has it.
        JobBusy: processes of it live.
        UsageError: a fork shares what is stored of it.
    """
    if not store.has_traces(job) and job not in coordination.jobs():
        raise UnknownJob(f"no job {job!r} in {store.where}; known jobs: {', '.join(store.jobs()) or 'none'}")
    members = [name for role in ProcessRole for name in coordination.living(role)]
    if (holder := coordination.holder(RUN_NODE)) is not None:
        members.append(f"`psa run` ({holder.partition(' ')[2]})")
    if members:
        raise JobBusy(f"job {job!r} is in use by {', '.join(members)}: end them first; nothing was removed")
    if forks := _forks(store, job):
        raise UsageError(
            f"job {job!r} holds parameters that {', '.join(forks)} began with, and still names: remove or continue "
            "them first; nothing was removed"
        )


def remove_job(store: RedisStore, coordination: Coordination, job: str) -> Removed:
    """Remove a job, its checkpoints included; files to which it was exported stay.

    Raises:
        UnknownJob, JobBusy, UsageError: as :func:`check_removable`; nothing was removed.
        DependencyUnreachable: Redis or ZooKeeper does not answer; the job may be half removed: repeat.
    """
    check_removable(store, coordination, job)
    with _right_to_remove(job, coordination):
        homes = _homes(store, job)
        keys, size_bytes = store.erase_job(job)
        for home in homes:
            _release(store, home, job)
        return Removed(keys, size_bytes, coordination.delete_job() - _HELD)


@contextmanager
def _right_to_remove(job: str, coordination: Coordination) -> Iterator[None]:
    with right_to_create(job, "remove", coordination):
        holder = coordination.hold(RUN_NODE, f"removal pid {os.getpid()}")
        if holder is not None:
            raise JobBusy(f"job {job!r} is in use by `psa run` ({holder.partition(' ')[2]}); nothing was removed")
        try:
            yield
        finally:
            coordination.release(RUN_NODE)


def _forks(store: RedisStore, job: str) -> list[str]:
    """Jobs that share chunks of this one, or are about to."""
    found = store.read_job(job)
    if found is None:
        return []
    try:
        layout = layout_from_json(found[1])
        sweep(store, job, layout)
        heads = store.heads(job, [shard.index for shard in layout.shards])
    except DataIntegrity:  # damaged: then only the others can tell
        return [other for other in store.jobs() if other != job and job in _homes(store, other)]
    names = {name for head in heads for name in head.pins} | store.read_checkpoints(job).keys()
    return sorted(name.removeprefix(FORK_PREFIX) for name in names if name.startswith(FORK_PREFIX))


def _homes(store: RedisStore, job: str) -> set[str]:
    """Jobs whose chunks this one shares; none that can be known, if it is damaged."""
    try:
        stored = read_job(store, job)
    except (DataIntegrity, UnknownJob):
        return set()
    return {each.home for head in stored.heads.values() for each in head.entries().values()} - {""}


def _release(store: RedisStore, home: str, job: str) -> None:
    """Free what ``home`` kept for a job that is gone."""
    found = store.read_job(home)
    if found is not None:
        store.forget_checkpoints(home, [FORK_PREFIX + job])  # else it looks like a fork that is being made
        sweep(store, home, layout_from_json(found[1]))
