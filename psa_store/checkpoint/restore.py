"""A job that Redis has lost: its servers write it again from memory, or ``--restore`` does from files.

ZooKeeper remembers that a job exists. A worker that finds it there and not in Redis never starts over from the
beginning. In this order:

1. Servers that live write the job again (see ``server``): :func:`await_servers` waits as long as one that lives may
   take, and says what else can be done if none does.
2. With ``PSA_RESTORE`` (`psa run --restore`), and no server alive, :func:`restore` imports the newest whole export from
   ``PSA_CHECKPOINT_FILES``. The worker that holds the right to create does this, so one alone reads files.
3. A job that neither ZooKeeper nor files know is a new one: there is nothing to restore.
"""

from __future__ import annotations

import time

from psa_store import logs
from psa_store.checkpoint.files.archive import Archive
from psa_store.checkpoint.files.importing import import_export
from psa_store.cluster import ProcessRole
from psa_store.config import Settings
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, JobBusy, JobMismatch, PsaError, UsageError
from psa_store.storage import RedisStore

_POLL_S = 0.05
_GRACE_S = 2.0


def await_servers(job: str, settings: Settings, store: RedisStore) -> tuple[str, str]:
    """Wait until a server has written the job again that Redis lost; raises DataIntegrity if none does."""
    logs.get_logger().warning("Redis has lost the job: waiting for its servers to write it again", job=job)
    deadline_s = time.monotonic() + settings.session_timeout_s + _GRACE_S
    while (stored := store.read_job(job)) is None:
        if time.monotonic() > deadline_s:
            raise DataIntegrity(
                f"job {job!r} exists in ZooKeeper, but Redis at {store.where} has lost it. {_way_out(job, settings)}"
            )
        time.sleep(_POLL_S)
    return stored


def restore(job: str, known: bool, settings: Settings, store: RedisStore, coordination: Coordination) -> bool:
    """Write a job that Redis does not have again from files; False if it is a new one, of which there are none.

    Args:
        known: whether ZooKeeper has the job. The caller holds ``CREATOR_NODE``, and looked there before it looked into
            Redis, where a job is written first.

    Raises:
        UsageError: it is not said where files are.
        JobBusy: servers live, and write it again from memory.
        DataIntegrity: none is whole.
    """
    if settings.checkpoint_files is None:
        raise UsageError("--restore: say where the files are, with PSA_CHECKPOINT_FILES or --checkpoint-files")
    archive, log = Archive(settings.checkpoint_files, job), logs.get_logger()
    if not known and archive.is_empty():
        log.warning("there is nothing to restore: neither ZooKeeper nor files know this job", job=job)
        return False
    if known and coordination.living(ProcessRole.SERVER):
        raise JobBusy(f"job {job!r}: servers live, and write it again from memory")
    export = archive.newest()
    log.warning("restoring from files", job=job, version=export.version, exported=export.created, folder=export.url)
    try:
        import_export(export, job, store, coordination, restore=True)
    except UsageError as error:
        # A server that lives after all, and whose lease we did not see, may have written the job from memory meanwhile.
        if isinstance(error, JobMismatch | JobBusy) or not store.has_job(job):
            raise
        log.info("another process restored the job", job=job, why=str(error))
    return True


def _way_out(job: str, settings: Settings) -> str:
    if settings.checkpoint_files is not None:
        try:
            if (export := Archive(settings.checkpoint_files, job).last()) is not None:
                return (
                    "`psa run --restore` goes on from the newest whole export; the last one written is "
                    f"of version {export.version}, {export.created}: {export.url}"
                )
        except PsaError as error:
            logs.get_logger().warning("no export to restore from", why=str(error))
    return "Restore Redis from its backup, or start over under another job name."
