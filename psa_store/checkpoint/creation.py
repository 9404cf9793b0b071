"""Writing a job that does not exist yet: at version 0, or at the version that was exported from another.

A creator proceeds like a controller that takes over: hold the right to create, take a term, seal, write one
version of every shard, and last of all store the job's documents. That last write is the moment at which the job
exists; a creator that dies before leaves nothing that the next one does not replace, and one that was only asleep finds
its writes fenced.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from psa_store.coordination import Coordination
from psa_store.coordination.identity import new_member_id
from psa_store.errors import Fenced, JobBusy
from psa_store.job.config import CREATOR_NODE, JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.job.model_files import ModelFiles
from psa_store.job.position import DataRecord
from psa_store.storage import Head, Manifest, RedisStore, ShardState, newest_term
from psa_store.testing.failpoints import failpoint

_HEADS_AT_ONCE = 256
_STREAM_BYTES = 64 << 20
"""About how much is committed in one stream: so much memory is needed, if states are made as they are taken."""
_NO_VERSION = -1
_GRACE_S = 10.0
_POLL_S = 0.05


@contextmanager
def right_to_create(job: str, role: str, coordination: Coordination) -> Iterator[None]:
    """Be the one process that may create the job; raises JobBusy if another is, and stays."""
    member, deadline_s = new_member_id(role), time.monotonic() + _GRACE_S
    while (holder := coordination.hold(CREATOR_NODE, member)) is not None and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)  # one that has died holds it until its session ends
    if holder is not None:
        raise JobBusy(f"job {job!r}: {holder} creates it at this moment. Wait for it, or use another job name.")
    try:
        yield
    finally:
        coordination.release(CREATOR_NODE)


def write_new_job(
    config: JobConfig,
    layout: Layout,
    version: int,
    states: Iterable[ShardState],
    store: RedisStore,
    coordination: Coordination,
    data: DataRecord | None = None,
    files: ModelFiles | None = None,
) -> None:
    """Create a job that Redis does not have, with these shards; the caller holds ``CREATOR_NODE``.

    Args:
        version: of the shards that change; frozen ones are written at version 0.
        states: one of each shard, in any order, taken as they are written.
        data: how the job has walked through its data so far; None: it begins.
        files: of its model.

    Raises:
        UsageError: its mode does not fit its layout; nothing was written.
        Fenced: the caller has slept past its session, and another creates the job.
        JobMismatch: another process has created it.
        DependencyUnreachable: Redis or ZooKeeper does not answer.
    """
    job = config.name
    config.check_shards(len(layout.shards_of(TensorRole.TRAINED)))
    term = begin_new_job(job, layout, store, coordination)
    failpoint("create.sealed")
    for at, some in _streams(layout, version, states):
        for _, outcome in store.commit_each(job, term, at, some, keep=config.versions_kept):
            if not isinstance(outcome, Manifest):
                raise outcome
    if data is not None:
        write_data_record(job, data, store)
    if files is not None:
        store.model_files(job).write(files)
    failpoint("create.before_documents")
    store.create_job(job, config.to_json(), layout.to_json())


def write_data_record(job: str, data: DataRecord, store: RedisStore) -> None:
    """Let a job that is being created walk through its data as another one did."""
    stored = store.data_record(job)
    seen, _ = stored.read()
    stored.replace(seen, data)


def begin_new_job(job: str, layout: Layout, store: RedisStore, coordination: Coordination) -> int:
    """Take a term for a job that Redis does not have, and seal its shards, empty; the caller holds ``CREATOR_NODE``.

    Raises:
        Fenced: another process creates the job.
        DependencyUnreachable: Redis or ZooKeeper does not answer.
    """
    left = _left_over(job, store)
    term = coordination.next_term(at_least=newest_term(left, 0))
    # A creator that died may have had another layout, or a newer version: none of its shards may be taken for ours.
    if left:
        store.delete_job(job, len(left))
    every = [shard.index for shard in layout.shards]
    heads = store.seal(job, every, term, layout.fingerprint)
    if any(head.layout != layout.fingerprint for head in heads):
        raise Fenced(f"job {job!r}: another process creates it at the same time, with another layout")
    store.trim(job, every, term, _NO_VERSION)
    return term


def _left_over(job: str, store: RedisStore) -> list[Head]:
    """The shards of a creator that died; they have no gaps, because all are sealed in one go."""
    heads: list[Head] = []
    while True:
        block = store.heads(job, range(len(heads), len(heads) + _HEADS_AT_ONCE))
        there = [head for head in block if head.term]
        heads += there
        if len(there) < _HEADS_AT_ONCE:
            return heads


def _streams(layout: Layout, version: int, states: Iterable[ShardState]) -> Iterator[tuple[int, list[ShardState]]]:
    """What to commit together, with its version."""
    some: list[ShardState] = []
    size_bytes, at = 0, 0
    for state in states:
        its = 0 if layout.shards[state.shard].role is TensorRole.FROZEN else version
        if some and (its != at or size_bytes >= _STREAM_BYTES):
            yield at, some
            some.clear()  # also for the caller, which has the list until the next one comes
            size_bytes = 0
        at = its
        some.append(state)
        size_bytes += sum(data.nbytes for _, data in state.arrays.values())
    if some:
        yield at, some
