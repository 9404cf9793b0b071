"""A checkpoint on command: of a job that runs, by its controller; of one that rests, here."""

from __future__ import annotations

import threading
import time

from psa_store.checkpoint import catalog
from psa_store.checkpoint.catalog import Checkpoint, Reason, checked_name, read_job, save_at_rest
from psa_store.checkpoint.request import CheckpointRequest, request_from_json
from psa_store.cluster import ProcessRole
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, DependencyUnreachable, Rewound, UsageError
from psa_store.storage import RedisStore

_LOOK_AGAIN_S = 0.5
_TRIES_AT_REST = 5


def save(
    store: RedisStore,
    coordination: Coordination,
    woken: threading.Event,
    job: str,
    name: str | None,
    timeout_s: float,
) -> Checkpoint:
    """Have a checkpoint of a job, which may be running.

    Args:
        woken: what ``coordination`` sets.
        name: None for one that says when; it is then one of those of which only some are kept.
        timeout_s: how long a job that runs may take: it must come to its next steps, and commit.

    Raises:
        UsageError: the name is taken, or the job cannot have a checkpoint now.
        DependencyUnreachable: it did not come in time. Nothing is left of the attempt.
    """
    taken = read_job(store, job).checkpoints
    if name is not None and checked_name(name) in taken:
        raise UsageError(f"job {job!r} has a checkpoint {name!r} already: prune it, or use another name")
    chosen = name or catalog.automatic_name(taken, time.time())
    deadline_s = time.monotonic() + timeout_s
    asked = False
    try:
        while time.monotonic() < deadline_s:
            woken.clear()
            if not coordination.members(ProcessRole.SERVER):
                return _at_rest(store, job, name)
            if not asked:
                if not coordination.request_checkpoint(chosen, CheckpointRequest(named=name is not None).to_json()):
                    raise UsageError(f"somebody is taking a checkpoint {chosen!r} of job {job!r} just now")
                asked = True
            answer = coordination.read_checkpoint_request(chosen, watch=True)
            if answer is None:
                return _found(store, job, chosen)
            if why := request_from_json(answer.text).failed:
                raise UsageError(f"no checkpoint of job {job!r}: {why}")
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


def _found(store: RedisStore, job: str, name: str) -> Checkpoint:
    checkpoint = read_job(store, job).checkpoints.get(name)
    if checkpoint is None:
        raise DataIntegrity(f"job {job!r}: checkpoint {name!r} was taken and is gone again: somebody has pruned it")
    return checkpoint


def _at_rest(store: RedisStore, job: str, name: str | None) -> Checkpoint:
    for _ in range(_TRIES_AT_REST):
        try:
            return save_at_rest(store, job, name, Reason.ASKED)
        except Rewound:
            continue  # it does not rest any more: the next look finds a newer version
    raise DependencyUnreachable(f"job {job!r} began while its checkpoint was taken: repeat the command")
