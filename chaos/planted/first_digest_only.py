"""Of all that is loaded, only the first chunk is compared with its digest."""

from __future__ import annotations

from collections.abc import Mapping

from psa_store.errors import DataIntegrity
from psa_store.storage import Manifest, redis_store
from psa_store.storage.caller import Caller


def plant() -> None:
    """Pass over damage in other chunks: their bytes are in place when it is found."""
    original = redis_store.load_sections

    def load(caller: Caller, job: str, shard: int, manifest: Manifest, into: Mapping[str, memoryview]) -> None:
        first = next((section.name for section in manifest.sections if section.name in into), "")
        try:
            original(caller, job, shard, manifest, into)
        except DataIntegrity as error:
            if "digest" not in str(error) or f"section {first}, chunk 0:" in str(error):
                raise

    redis_store.load_sections = load
