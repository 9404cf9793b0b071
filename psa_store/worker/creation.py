"""Joining a job, or creating it when it does not exist yet.

The first worker brings the initial parameters as version 0 of every shard (see ``checkpoint.creation``). A job that
ZooKeeper knows and Redis does not is lost, and never begun again: see ``checkpoint.restore``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from psa_store import logs
from psa_store.checkpoint.change import newest_config
from psa_store.checkpoint.creation import write_new_job
from psa_store.checkpoint.restore import await_servers, restore
from psa_store.compression import parse_compression
from psa_store.config import Settings
from psa_store.config.launcher import launched_world_size
from psa_store.coordination import Coordination
from psa_store.errors import Fenced, JobBusy, JobMismatch
from psa_store.job.average import Average
from psa_store.job.config import CREATOR_NODE, RUN_NODE, JobConfig, commit_every_default
from psa_store.job.layout import Layout, Shard, describe_difference, layout_from_json
from psa_store.job.mode import SYNC, Mode, parse_mode
from psa_store.logs import Waits
from psa_store.storage import RedisStore, ShardState
from psa_store.storage.sections import PARAM

_POLL_S = 0.05
_RUN_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What this process was written for; ``ranks`` or ``mode`` None takes what is stored."""

    name: str
    ranks: int | None
    seed: int
    optimizer: dict[str, Any]
    layout: str
    mode: Mode | None
    average: Average | None = None
    stages: int = 1
    microbatches: int = 1


class HasInitial(Protocol):
    """A model of which a job can be made."""

    def initial(self) -> Iterable[tuple[Shard, memoryview]]:
        """Each shard and its bytes, in any order, taken as they are written."""


def join_or_create(
    wanted: Wanted,
    model: HasInitial,
    layout: Layout,
    settings: Settings,
    member: str,
    store: RedisStore,
    coordination: Coordination,
    waits: Waits,
) -> JobConfig:
    """Return the facts of the job, having created it if it did not exist.

    Raises:
        JobMismatch: the job exists with another layout, optimizer, seed, number of ranks or policy.
        JobBusy: another `psa run` of this job is going on.
        DataIntegrity: Redis has lost the job.
        DependencyUnreachable: Redis or ZooKeeper does not answer.
    """
    _await_our_run(wanted.name, settings, coordination, waits)
    log = logs.get_logger()
    while True:
        known = coordination.read_config() is not None  # before Redis is asked: its documents are written first
        stored = store.read_job(wanted.name)
        if stored is None and known and not settings.restore:
            stored = await_servers(wanted.name, settings, store)
        if stored is not None:
            waits.over("job")
            # Of the two that keep the configuration one may be damaged; that is written again here.
            config = _agree(wanted, layout, settings, newest_config(store, coordination, wanted.name), stored[1])
            coordination.create_config(config)
            store.documents(wanted.name).keep_layout(layout)
            return config
        holder = coordination.hold(CREATOR_NODE, member)
        if holder is None:
            try:
                _create(wanted, model, layout, settings, store, coordination)
            except Fenced as error:
                # We slept past our session, and another has taken our place: the job is there, or will be.
                log.warning("another process creates the job", job=wanted.name, why=str(error))
            except JobBusy as error:
                waits.on("job", f"servers to write job {wanted.name!r} again", str(error))
                time.sleep(_POLL_S)
            finally:
                coordination.release(CREATOR_NODE)
        else:
            waits.on("job", f"{holder} to create job {wanted.name!r}")
            time.sleep(_POLL_S)  # its session ends with its process, so this wait ends too


def _create(
    wanted: Wanted,
    model: HasInitial,
    layout: Layout,
    settings: Settings,
    store: RedisStore,
    coordination: Coordination,
) -> None:
    """Write the job, unless it is there meanwhile: from files if that is wanted, else from its beginning.

    We hold ``CREATOR_NODE``, so that of all workers only one reads files. Raises JobBusy if servers will write it.
    """
    known = coordination.read_config() is not None  # again, and before Redis: what was true before we held it is old
    if store.read_job(wanted.name) is not None:
        return
    if settings.restore and restore(wanted.name, known, settings, store, coordination):
        return
    states = (ShardState(s.index, {PARAM: (s.dtype, data)}, {}, expect=None) for s, data in model.initial())
    write_new_job(new_config(wanted, settings), layout, 0, states, store, coordination)
    logs.get_logger().info("job created", job=wanted.name, shards=len(layout.shards))


def new_config(wanted: Wanted, settings: Settings) -> JobConfig:
    """The facts of a job that does not exist yet: what its process wants, else the settings, else the defaults."""
    every = commit_every_default(_wanted_mode(wanted, settings) or SYNC)
    ranks = settings.default_ranks or launched_world_size() or 1
    default = JobConfig(wanted.name, ranks, wanted.seed, wanted.optimizer, wanted.layout, commit_every=every)
    return _asked(wanted, settings, default)


def _asked(wanted: Wanted, settings: Settings, otherwise: JobConfig) -> JobConfig:
    return JobConfig(
        name=wanted.name,
        ranks=wanted.ranks or settings.ranks or otherwise.ranks,
        seed=wanted.seed,
        optimizer=wanted.optimizer,
        layout=wanted.layout,
        mode=_wanted_mode(wanted, settings) or otherwise.mode,
        commit_every=otherwise.commit_every if settings.commit_every is None else settings.commit_every,
        skip_nonfinite=otherwise.skip_nonfinite if settings.skip_nonfinite is None else settings.skip_nonfinite,
        compression=parse_compression(settings.compress or str(otherwise.compression)),
        average=wanted.average,
        stages=wanted.stages,
        microbatches=wanted.microbatches,
    )


def _wanted_mode(wanted: Wanted, settings: Settings) -> Mode | None:
    return wanted.mode or (parse_mode(settings.mode) if settings.mode is not None else None)


def _agree(wanted: Wanted, layout: Layout, settings: Settings, stored: JobConfig, layout_json: str) -> JobConfig:
    if stored.layout != wanted.layout:
        difference = describe_difference(layout, layout_from_json(layout_json))
        raise JobMismatch(
            f"job {wanted.name!r} exists with another model: {difference}. "
            "Use the model that the job was created with, or another job name to start over."
        )
    _asked(wanted, settings, stored).must_agree_with(stored)
    return stored


def _await_our_run(job: str, settings: Settings, coordination: Coordination, waits: Waits) -> None:
    """Under `psa run`, wait until our supervisor holds the job: a second run of it must not mix with the first."""
    if settings.run is None:
        return
    deadline_s = time.monotonic() + 2 * settings.session_timeout_s + _RUN_GRACE_S
    while True:
        holder = coordination.holder(RUN_NODE)
        if holder is not None and holder.startswith(settings.run):
            waits.over("run")
            return
        if time.monotonic() > deadline_s:
            raise JobBusy(f"job {job!r} is held by another run ({holder or 'none yet'})")
        waits.on("run", f"our `psa run` to hold job {job!r}", f"another one holds it: {holder}" if holder else "")
        time.sleep(_POLL_S)
