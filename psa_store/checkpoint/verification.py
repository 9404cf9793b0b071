"""Is every byte of a version as it was written? Reads all of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from psa_store.checkpoint.reader import open_version
from psa_store.errors import DataIntegrity
from psa_store.storage import RedisStore

_READERS = 4


def verify(store: RedisStore, job: str, what: str | None) -> list[str]:
    """What is wrong with a checkpoint or a version (None: the newest), one sentence for each shard; empty if nothing.

    Raises:
        UsageError: there is no such checkpoint or version.
        DataIntegrity: a shard lacks it.
    """
    version = open_version(store, job, what)

    def read(shard: int) -> str:
        try:
            version.sections(shard)
        except DataIntegrity as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(_READERS, thread_name_prefix="psa-verify") as readers:
        return [problem for problem in readers.map(read, version.manifests) if problem]
