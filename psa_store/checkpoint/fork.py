"""Another job that begins where this one has a checkpoint. It shares the chunks, so it costs nothing but its heads.

The new job's manifests name the job whose chunks they are; that job keeps them, under a pin of the fork's name, until
no version and no checkpoint of the fork names them any more (see ``catalog.sweep``).
"""

from __future__ import annotations

from dataclasses import replace

from psa_store.checkpoint.catalog import FORK_PREFIX, read_job
from psa_store.checkpoint.creation import begin_new_job, right_to_create, write_data_record
from psa_store.checkpoint.take import announce
from psa_store.coordination import Coordination
from psa_store.errors import JobMismatch
from psa_store.job.config import check_job_name
from psa_store.storage import RedisStore
from psa_store.testing.failpoints import failpoint


def fork(store: RedisStore, coordination: Coordination, job: str, what: str, new: str) -> int:
    """Create job ``new`` from a checkpoint, or a version, of ``job``; returns the version at which it begins.

    Args:
        coordination: a session for the new job.

    Raises:
        UsageError: there is no such checkpoint or version; JobMismatch if there is a job ``new``; JobBusy if another
            process creates it now.
        Rewound: the version was dropped meanwhile. Try again, or take a checkpoint before.
    """
    check_job_name(new)
    stored = read_job(store, job)
    manifests = stored.manifests(what)
    if store.has_job(new) or coordination.read_config() is not None:
        raise JobMismatch(f"there is a job {new!r} already: use another name")
    with right_to_create(new, "fork", coordination):
        shared = {
            shard: replace(manifest, home=manifest.home or job, extra=False) for shard, manifest in manifests.items()
        }
        for home in {manifest.home for manifest in shared.values()}:  # the jobs whose chunks these are keep them
            announce(store, home, FORK_PREFIX + new)
            nonces = {shard: manifest.nonce for shard, manifest in shared.items() if manifest.home == home}
            store.share(home, nonces, FORK_PREFIX + new)
        term = begin_new_job(new, stored.layout, store, coordination)
        for shard, manifest in shared.items():
            store.adopt(new, shard, manifest, term)
        _, data = store.data_record(job).read()
        if data is not None:
            write_data_record(new, data.known_to(()), store)
        if (files := store.model_files(job).read()) is not None:
            store.model_files(new).write(files)
        failpoint("fork.adopted")
        config = replace(stored.config, name=new)
        store.create_job(new, config.to_json(), stored.layout.to_json())
        coordination.create_config(config)
    return stored.version_of(what)
