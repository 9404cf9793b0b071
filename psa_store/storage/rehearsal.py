"""Whether a Redis lets a job do all that it will do: done once, under a name of its own, before a job depends on it.

An ACL refuses a command when it is used, which may be hours later: HDEL with the first version that is dropped.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from psa_store.errors import DependencyUnreachable
from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.commit import ShardState

if TYPE_CHECKING:
    from psa_store.storage.redis_store import RedisStore

_EXPIRY_S = 60
_TERM = 1
_SECTION = "p"


def rehearse(store: RedisStore, caller: Caller) -> None:
    """Create, seal, commit, load, pin, drop, sweep, and keep a history; nothing of it is left.

    Raises:
        DependencyUnreachable: Redis does not answer.
        DependencyUnfit: it refuses; the message names the command.
    """
    job = f"rehearsal-{secrets.token_hex(8)}"
    try:
        _documents(caller, job)
        _versions(store, caller, job)
        _history(caller, job)
    finally:
        with suppress(DependencyUnreachable):  # what was refused before says more
            store.delete_job(job, 1)


def _documents(caller: Caller, job: str) -> None:
    config, layout = keys.config(job), keys.layout(job)
    caller.functions([("psa_create", [config, layout], ["{}", "{}"]), ("psa_replace", [config], ["{}", "{}"])])
    listed, checkpoints = keys.probe(job, 0), keys.checkpoints(job)
    client = caller.client
    for attempt in (
        lambda: client.sadd(listed, job),
        lambda: client.smembers(listed),
        lambda: client.srem(listed, job),
        lambda: client.mget(config, layout),
        lambda: client.exists(config),
        lambda: client.hset(checkpoints, job, "{}"),
        lambda: client.hget(checkpoints, job),
        lambda: client.hgetall(checkpoints),
        lambda: client.hdel(checkpoints, job),
    ):
        caller.retrying(attempt)


def _versions(store: RedisStore, caller: Caller, job: str) -> None:
    """The second version drops the first, as all do that come later."""
    store.seal(job, [0], _TERM, "0" * 64)
    data = memoryview(bytes(16))
    for version, expect in ((1, None), (2, 1)):
        state = ShardState(0, {_SECTION: ("float32", data)}, {}, expect)
        for _, outcome in store.commit_each(job, _TERM, version, [state], keep=1):
            if isinstance(outcome, Exception):
                raise outcome
    store.pin(job, [0], 2, "rehearsal")
    (head,) = store.heads(job, [0])
    read = memoryview(bytearray(data.nbytes))
    store.load(job, 0, head.manifests[0], {_SECTION: read})
    store.unpin(job, [0], ["rehearsal"])
    store.mark_corrupt(job, 0, _TERM, 2)
    left = keys.probe(job, 1)
    caller.retrying(lambda: caller.client.set(left, b"", ex=_EXPIRY_S))
    caller.functions([("psa_sweep", [left], [])])
    store.remove_foreign(job, [0])
    store.model_files(job).digest()
    store.server_run_id()


def _history(caller: Caller, job: str) -> None:
    events, curve = keys.events(job), keys.curve(job)
    point = "psa_point", [curve, keys.curve_interval(job)], ["{}", 0]
    caller.functions([("psa_event", [events], ["{}", 1]), point, point])
    client = caller.client
    entries: Any = caller.retrying(lambda: client.xrange(curve))
    caller.retrying(lambda: client.xdel(curve, *(number for number, _ in entries)))
