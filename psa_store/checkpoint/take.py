"""The one door to take a checkpoint.

* :func:`take`: of any job. If servers serve it, its controller is asked and awaited; else it is done here.
* :func:`take_at_rest`, :func:`take_at_end`: of a job that no server serves, or serves any longer.
* :func:`announce` and :func:`complete`: how every one of these begins and ends. Between them the version is pinned in
  the head of every shard: here, or by the servers while training goes on (see ``server/checkpoints.py``).
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from psa_store import logs
from psa_store.checkpoint.catalog import (
    Checkpoint,
    CheckpointPolicy,
    Making,
    Reason,
    StoredJob,
    automatic_name,
    checked_name,
    documents,
    read_job,
    remove,
    tidy,
)
from psa_store.checkpoint.files.archive import Archive
from psa_store.cluster import ProcessRole
from psa_store.coordination import CheckpointRequest, Coordination, StoredPlan
from psa_store.errors import DataIntegrity, DependencyUnreachable, PsaError, Rewound, UsageError
from psa_store.job.config import JobConfig
from psa_store.job.document import Damaged, to_text
from psa_store.job.layout import Layout
from psa_store.storage import RedisStore, newest_term
from psa_store.storage.sections import CLOCK

_LOOK_AGAIN_S = 0.5
_END = "checkpoint-at-end"
"""Name that one of the servers that leave last holds in ZooKeeper."""


def take(
    store: RedisStore, coordination: Coordination, woken: threading.Event, job: str, name: str | None, timeout_s: float
) -> Checkpoint:
    """Take a checkpoint of a job, whatever the job does: of one that runs its controller is asked for it.

    Args:
        woken: what ``coordination`` sets.
        name: None for one that says when; it is then one of those of which only some are kept.
        timeout_s: how long a job that runs may take: it must come to its next steps, and commit.

    Raises:
        UsageError: the name is taken, or the job cannot have a checkpoint now.
        DependencyUnreachable: it did not come in time. Nothing is left of the attempt.
    """
    chosen = _free_name(read_job(store, job), name)
    deadline_s = time.monotonic() + timeout_s
    asked, waits = False, logs.Waits()
    try:
        while time.monotonic() < deadline_s:
            woken.clear()
            if not coordination.living(ProcessRole.SERVER):
                waits.on("take", f"job {job!r} to rest, or a server of it to come")
                with suppress(Rewound):  # it does not rest any more: look again
                    return take_at_rest(store, job, name, Reason.ASKED)
                woken.wait(_LOOK_AGAIN_S)
                continue
            if not asked:
                if not coordination.request_checkpoint(chosen, CheckpointRequest(named=name is not None)):
                    raise UsageError(f"a checkpoint {chosen!r} of job {job!r} is being taken just now")
                asked = True
            answer = coordination.read_checkpoint_request(chosen, watch=True)
            if answer is None:
                return _found(store, job, chosen)
            if isinstance(answer, Damaged):
                raise UsageError(
                    f"no checkpoint of job {job!r}: another process wrote over its request in ZooKeeper: ask again"
                )
            if answer.failed:
                raise UsageError(f"no checkpoint of job {job!r}: {answer.failed}")
            waits.on("take", f"checkpoint {chosen} of job {job!r}", "its servers take it some steps ahead")
            woken.wait(_LOOK_AGAIN_S)
    finally:
        if asked:
            coordination.withdraw_checkpoint_request(chosen)
    if chosen in read_job(store, job).checkpoints:
        return _found(store, job, chosen)  # it was there at the last moment
    raise DependencyUnreachable(
        f"no checkpoint of job {job!r} in {timeout_s:g} s: see `psa status {job}` whether it moves, or "
        "give it more time with --timeout"
    )


def _free_name(stored: StoredJob, name: str | None) -> str:
    if name is not None and checked_name(name) in stored.checkpoints:
        raise UsageError(f"job {stored.config.name!r} has a checkpoint {name!r} already: prune it, or use another name")
    return name or automatic_name(stored.checkpoints, time.time())


def _found(store: RedisStore, job: str, name: str) -> Checkpoint:
    checkpoint = read_job(store, job).checkpoints.get(name)
    if checkpoint is None:
        raise DataIntegrity(f"job {job!r}: checkpoint {name!r} was taken and is gone again: it was pruned")
    return checkpoint


def take_at_rest(store: RedisStore, job: str, name: str | None, reason: Reason) -> Checkpoint:
    """Take the newest version of a job that no server serves.

    Raises:
        UsageError: the name is taken.
        DataIntegrity: no version is whole.
        Rewound: servers have begun to serve the job, and the version was dropped meanwhile. Try again.
    """
    stored = read_job(store, job)
    chosen = _free_name(stored, name)
    version = stored.version_of(None)
    announce(store, job, chosen)
    try:
        store.pin(job, [shard.index for shard in stored.layout.versioned], version, chosen)
    except Rewound:
        remove(store, job, stored.layout, [chosen])
        raise
    term = newest_term(stored.heads.values(), 0)
    return complete(
        store, stored.config, stored.layout, chosen, version, term=term, reason=reason, named=name is not None
    )


def take_at_end(
    config: JobConfig, layout: Layout, store: RedisStore, coordination: Coordination, policy: CheckpointPolicy
) -> None:
    """By the last server that leaves: take what it leaves, be it that the job ended or that SIGTERM announced it.

    What it leaves is durable without it; that there is no checkpoint is logged, and is no failure.
    """
    log = logs.get_logger()
    try:
        seen = coordination.read_plan()
        if (
            not isinstance(seen, StoredPlan)
            or seen.plan.owners
            or coordination.hold(_END, "the last server") is not None
        ):
            return  # others go on, or have begun again, or another one that has left does it
        stored = read_job(store, config.name)
        newest = stored.versions()[-1:]
        if any([each.version] == newest for each in stored.checkpoints.values()):
            return
        done = take_at_rest(store, config.name, None, Reason.END)
        log.info("checkpoint", name=done.name, version=done.version)
        tidy(store, config.name, layout, policy)
        if policy.files is not None:
            archive = Archive(policy.files, config.name)
            export = archive.write(store, done.name)
            archive.prune(policy.keep, policy.older_than_s)
            log.info("checkpoint in files", checkpoint=done.name, version=export.version, folder=export.url)
    except PsaError as error:
        log.error("no checkpoint at the end", why=str(error))


def announce(store: RedisStore, job: str, name: str) -> None:
    """Say that under this name a checkpoint is going to be made, or to be shared with a fork: no sweep removes it."""
    store.write_checkpoint(job, name, to_text(Making(time.time())))


def complete(
    store: RedisStore,
    config: JobConfig,
    layout: Layout,
    name: str,
    version: int,
    *,
    term: int,
    reason: Reason,
    named: bool,
) -> Checkpoint:
    """Every shard has the pin: write the document, with which the checkpoint exists. Returns what is there already.

    Raises:
        DataIntegrity: a shard lacks the pin.
    """
    there = documents(store.read_checkpoints(config.name)).get(name)
    if there is not None and there.version == version:
        return there
    heads = store.heads(config.name, [shard.index for shard in layout.versioned])
    pins = [head.pins.get(name) for head in heads]
    if any(pin is None or pin.version != version for pin in pins):
        raise DataIntegrity(f"job {config.name!r}: checkpoint {name!r} lost its pins before it was complete")
    clocks = [value for pin in pins if pin for what, value in pin.scalars.items() if what.startswith(CLOCK)]
    checkpoint = Checkpoint(
        name=name,
        version=version,
        step=int(min(clocks)) if clocks else version,
        term=term,
        created_s=time.time(),
        reason=reason,
        named=named,
        bytes=sum(section.size_bytes for pin in pins if pin for section in pin.sections),
        config=config.facts(),
    )
    store.write_checkpoint(config.name, name, checkpoint.to_json())
    return checkpoint
