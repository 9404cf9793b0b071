"""All keys of a job, found by its name, so that also a job can be removed that is damaged or half removed."""

from __future__ import annotations

from functools import partial
from typing import Any

from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.connection import text

_KEYS_AT_ONCE = 1000


def keys_of(caller: Caller, job: str) -> list[str]:
    """Every key that has the job's name."""
    pattern = f"psa:{{{job}[:}}]*"  # names of jobs hold nothing that means something in a pattern
    found = caller.retrying(lambda: list(caller.client.scan_iter(pattern, count=_KEYS_AT_ONCE)))
    return sorted({text(key) for key in found})


def erase(caller: Caller, job: str) -> tuple[int, int]:
    """Remove them, and the job from the list; returns how many they were, and their bytes in Redis."""
    caller.retrying(lambda: caller.client.srem(keys.JOBS, job))
    found = keys_of(caller, job)
    size_bytes = 0
    for start in range(0, len(found), _KEYS_AT_ONCE):
        some = found[start : start + _KEYS_AT_ONCE]
        size_bytes += caller.retrying(partial(_size, caller, some))
        caller.retrying(partial(caller.client.unlink, *some))
    return len(found), size_bytes


def _size(caller: Caller, some: list[str]) -> int:
    pipeline: Any = caller.client.pipeline(transaction=False)
    for key in some:
        pipeline.memory_usage(key)
    return sum(size or 0 for size in pipeline.execute())
