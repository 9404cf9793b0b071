"""Is every byte of a version as it was written? Reads all of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from psa_store.checkpoint.catalog import read_job
from psa_store.errors import DataIntegrity
from psa_store.storage import Manifest, RedisStore

_READERS = 4


def verify(store: RedisStore, job: str, what: str | None) -> list[str]:
    """What is wrong with a checkpoint or a version (None: the newest), one sentence for each shard; empty if nothing.

    Raises:
        UsageError: there is no such checkpoint or version.
        DataIntegrity: a shard lacks it.
    """
    manifests = read_job(store, job).manifests(what)

    def read(shard: int, manifest: Manifest) -> str:
        places = {section.name: memoryview(bytearray(section.size_bytes)) for section in manifest.sections}
        try:
            store.load(job, shard, manifest, places)
        except DataIntegrity as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(_READERS, thread_name_prefix="psa-verify") as readers:
        found = readers.map(read, manifests.keys(), manifests.values())
        return [problem for problem in found if problem]
