"""`psa checkpoint export` and `psa checkpoint import`: a version of a job to files, and a new job from them."""

from __future__ import annotations

import time

from psa_store.checkpoint.files.export import MAX_FILE_BYTES, export_average, export_version, open_export
from psa_store.checkpoint.files.folder import Folder
from psa_store.checkpoint.files.importing import import_export
from psa_store.checkpoint.reader import open_version
from psa_store.config import Settings
from psa_store.coordination import Coordination
from psa_store.job.config import JobConfig, check_job_name
from psa_store.job.layout import Layout
from psa_store.logs import printable
from psa_store.observe.formatting import seconds, size
from psa_store.storage import RedisStore


def export_files(
    job: str,
    what: str | None,
    url: str,
    settings: Settings,
    max_file_bytes: int = MAX_FILE_BYTES,
    *,
    average: bool = False,
) -> None:
    """Write a checkpoint or a version of a job (None: the newest) into a new folder, and say so in one line.

    ``average``: only its model, with the average of the parameters.
    """
    started_s = time.monotonic()
    with RedisStore.from_settings(settings) as store:
        version = open_version(store, job, what)
        if average:
            files = export_average(version, url, max_file_bytes)
        else:
            files = list(export_version(version, url, max_file_bytes).files)
    size_bytes, took_s = sum(file.size_bytes for file in files), time.monotonic() - started_s
    print(
        f"exported {'the average of ' if average else ''}version {version.version} of job {job!r} to "
        f"{printable(Folder(url).url)}: {len(files)} files, "
        f"{size(size_bytes)} in {seconds(took_s)}"
    )


def import_files(
    url: str,
    job: str,
    settings: Settings,
    ranks: int | None,
    shard_bytes: int | None,
    like: tuple[JobConfig, Layout] | None = None,
) -> None:
    """Create ``job`` from the export in the folder at ``url``, cut like another one, and say so in one line."""
    check_job_name(job)
    with RedisStore.from_settings(settings) as store, Coordination.from_settings(settings, job) as coordination:
        store.check()
        export = open_export(url)
        config = import_export(export, job, store, coordination, ranks=ranks, shard_bytes=shard_bytes, like=like)
    stages = f", {config.stages} stages" if config.stages > 1 else ""
    print(
        f"created job {job!r} at step {export.step} from version {export.version} of {export.config.name!r}: "
        f"{config.ranks} ranks, mode {config.mode}{stages}"
    )
