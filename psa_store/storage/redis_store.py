"""The only way to Redis: job documents, the fence, commits, and loads. Thread-safe.

Every operation is idempotent, or made so (a commit carries a nonce), so that it may be tried again after an answer
was lost; tenacity does that, in one place, until ``timeout_s`` is over.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

import redis
import tenacity
from xxhash import xxh3_128_hexdigest

from psa_store.errors import (
    DataIntegrity,
    DependencyUnfit,
    DependencyUnreachable,
    Fenced,
    JobMismatch,
    Rewound,
)
from psa_store.storage import keys
from psa_store.storage.connecting import make_pool, printable, text, translated
from psa_store.storage.reading import read_into
from psa_store.storage.records import (
    CHUNK_BYTES,
    Head,
    Manifest,
    Section,
    epoch_text,
    head_from_fields,
    version_field,
)

_CHUNK_EXPIRY_S = 3600
"""Chunks live this long until a commit makes them permanent: a writer that dies leaves nothing behind."""
_RETRY_PAUSE_S = 0.05
_PIPELINE_SHARDS = 256
_TRIES_MAX = 5
"""Looks at a head before a change is given up: each fails only if the head changed between look and change."""

T = TypeVar("T")


class RedisStore:
    """Versioned shards of jobs in one Redis.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        timeout_s: how long one operation may take, its retries included.
        connections_max: connections that are open at the same time at most.
    """

    def __init__(self, url: str, *, timeout_s: float, connections_max: int = 8) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._pool = make_pool(url, timeout_s, connections_max)
        self._client = redis.Redis(connection_pool=self._pool)
        self._library = (files("psa_store.storage") / "functions.lua").read_text()

    def close(self) -> None:
        self._pool.disconnect()

    def check(self) -> None:
        """Make sure that Redis is there and safe to use, and that it has our functions.

        Raises:
            DependencyUnreachable: no answer within ``timeout_s``.
            DependencyUnfit: it evicts keys, or is too old for functions.
        """
        with translated(self._url):
            info = self._retrying(lambda: self._client.info())
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise DependencyUnfit(
                f"Redis at {printable(self._url)} has maxmemory-policy {policy}: it may throw parameters away. "
                "Set `maxmemory-policy noeviction` in its configuration."
            )
        self._load_library()

    def server_run_id(self) -> str:
        """Changes when Redis restarts or another instance takes over."""
        with translated(self._url):
            return str(self._client.info("server")["run_id"])

    # --- jobs

    def create_job(self, job: str, config_json: str, layout_json: str) -> None:
        """Store a job's documents; raises JobMismatch if others are stored under this name."""
        # Listed first: a job that is listed but does not exist is skipped by jobs(), the reverse could not be found.
        with translated(self._url):
            self._retrying(lambda: self._client.sadd(keys.JOBS, job))
        stored = self._function("psa_create", [keys.config(job), keys.layout(job)], [config_json, layout_json])
        if [text(each) for each in stored] != [config_json, layout_json]:
            raise JobMismatch(f"job {job!r} was created by another process at the same time: run again to join it")

    def read_job(self, job: str) -> tuple[str, str] | None:
        """The job's configuration and layout as they were created; None if there is no such job."""
        with translated(self._url):
            found: list[Any] = self._retrying(lambda: self._client.mget(keys.config(job), keys.layout(job)))
        return (text(found[0]), text(found[1])) if found[0] and found[1] else None

    def jobs(self) -> list[str]:
        with translated(self._url):
            members: Iterable[Any] = self._retrying(lambda: self._client.smembers(keys.JOBS))
            names = sorted(text(member) for member in members)
            exist = self._retrying(partial(self._exist, [keys.config(name) for name in names]))
        return [name for name, there in zip(names, exist, strict=True) if there]

    def _exist(self, its_keys: Sequence[str]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for key in its_keys:
            pipeline.exists(key)
        return list(pipeline.execute())

    def delete_job(self, job: str, n_shards: int) -> None:
        """Remove everything of a job. Nothing may be running on it."""
        for head in self.heads(job, range(n_shards)):
            gone = [key for manifest in head.manifests for key in manifest.chunk_keys(job, head.shard)]
            with translated(self._url):
                self._retrying(partial(self._client.unlink, keys.head(job, head.shard), *gone))
        with translated(self._url):
            self._retrying(lambda: self._client.unlink(keys.config(job), keys.layout(job)))
            self._retrying(lambda: self._client.srem(keys.JOBS, job))

    # --- the fence

    def seal(self, job: str, shards: Iterable[int], epoch: int, layout: str) -> list[Head]:
        """Refuse commits of lower epochs from now on; returns the heads, which only ``epoch`` can change now.

        Raises:
            Fenced: a head has a higher epoch. Some others may be sealed at ours.
        """
        listed = list(shards)
        calls = [("psa_seal", [keys.head(job, shard)], [epoch_text(epoch), layout]) for shard in listed]
        heads = []
        for shard, reply in zip(listed, self._functions(calls), strict=True):
            if reply[0] == b"fenced":
                raise Fenced(f"job {job!r}, shard {shard}: sealed at epoch {int(reply[1], 16)}, not {epoch}")
            flat = reply[1]
            heads.append(head_from_fields(job, shard, dict(zip(flat[::2], flat[1::2], strict=True))))
        return heads

    def heads(self, job: str, shards: Iterable[int]) -> list[Head]:
        """What is committed, without changing anything."""
        listed = list(shards)
        found: list[Head] = []
        for start in range(0, len(listed), _PIPELINE_SHARDS):
            some = listed[start : start + _PIPELINE_SHARDS]
            with translated(self._url):
                replies = self._retrying(partial(self._hgetall, job, some))
            found += [head_from_fields(job, shard, reply) for shard, reply in zip(some, replies, strict=True)]
        return found

    def _hgetall(self, job: str, shards: Sequence[int]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for shard in shards:
            pipeline.hgetall(keys.head(job, shard))
        return list(pipeline.execute())

    # --- versions

    def commit(
        self,
        job: str,
        shard: int,
        epoch: int,
        version: int,
        arrays: Mapping[str, tuple[str, memoryview]],
        scalars: Mapping[str, float | int],
        *,
        keep: int,
        expect: int | None,
    ) -> Manifest:
        """Make one version of a shard durable: write its chunks, then flip the head, if ``epoch`` still owns it.

        Args:
            arrays: section name -> (dtype, bytes); the memory must not change until this returns.
            keep: how many versions the head keeps; older ones are dropped in the same flip.
            expect: the version that the caller committed last, None if he does not know of one.

        Raises:
            Fenced: a newer epoch owns the shard. Nothing was changed.
            Rewound: Redis does not know what we committed before: it went back in time. Nothing was changed.
            DependencyUnreachable: Redis does not answer; whether the version is committed is unknown. Try again.
        """
        manifest = Manifest(version, epoch, secrets.token_hex(4), _digest(arrays), dict(scalars))
        self._write_chunks(job, shard, manifest, arrays)
        for _ in range(_TRIES_MAX):
            (head,) = self.heads(job, [shard])
            stored = head.manifest(version)
            if stored is not None and stored.nonce == manifest.nonce:
                return manifest  # an earlier try did it, and only its answer was lost
            try:
                reply = self._flip(job, head, manifest, keep, expect)
            except DependencyUnfit:
                raise
            except DependencyUnreachable:
                continue  # done or not? The head knows, and if Redis is still away, looking raises
            match reply[0]:
                case b"ok":
                    return manifest
                case b"fenced":
                    raise Fenced(
                        f"job {job!r}, shard {shard}: commit of version {version} refused, epoch "
                        f"{int(reply[1], 16)} owns the shard and ours is {epoch}"
                    )
                case b"rewound":
                    raise Rewound(f"job {job!r}, shard {shard}: Redis lost {text(reply[1])!r}, which we wrote")
                case b"missing":
                    self._write_chunks(job, shard, manifest, arrays)
                case _:  # changed since we read it: look again
                    continue
        raise self._unsettled(job, shard, f"version {version} could not be committed")

    def _unsettled(self, job: str, shard: int, what: str) -> DependencyUnreachable:
        return DependencyUnreachable(
            f"Redis at {printable(self._url)}: job {job!r}, shard {shard}: {what} in {_TRIES_MAX} tries, because its "
            "head or its chunks changed every time. Try again, and see who else writes to the keys of this job."
        )

    def _flip(self, job: str, head: Head, manifest: Manifest, keep: int, expect: int | None) -> list[Any]:
        others = [each for each in head.manifests if each.version != manifest.version]
        kept = sorted([each.version for each in others] + [manifest.version])[-keep:]
        old = [each for each in head.manifests if each.version == manifest.version or each.version not in kept]
        chunks = manifest.chunk_keys(job, head.shard)
        sizes = [size for section in manifest.sections for size in _chunk_sizes(section.size_bytes)]
        return self._function(
            "psa_commit",
            [
                keys.head(job, head.shard),
                *chunks,
                *(key for each in old for key in each.chunk_keys(job, head.shard)),
            ],
            [
                epoch_text(manifest.epoch),
                manifest.field,
                manifest.to_json(),
                "" if expect is None else version_field(expect),
                len(chunks),
                *sizes,
                len(head.manifests),
                *_identities(head.manifests),
                *(each.field for each in old),
            ],
        )

    def _write_chunks(
        self, job: str, shard: int, manifest: Manifest, arrays: Mapping[str, tuple[str, memoryview]]
    ) -> None:
        """Write the chunks that are not there yet.

        NX, because a SET whose connection broke may arrive after another try and the flip are done: it would give a
        committed chunk its expiry back, and the version would vanish an hour later.
        """
        parts = [part for _, data in arrays.values() for part in _chunks(data)]
        for key, part in zip(manifest.chunk_keys(job, shard), parts, strict=True):
            with translated(self._url):
                self._retrying(partial(self._client.set, key, part, ex=_CHUNK_EXPIRY_S, nx=True))

    def trim(self, job: str, shards: Iterable[int], epoch: int, newest: int) -> None:
        """Drop versions newer than ``newest``; raises Fenced or Rewound if ``epoch`` does not own a shard."""
        for head in self.heads(job, shards):
            self._drop(job, head, epoch, lambda version: version > newest)

    def condemn(self, job: str, shard: int, epoch: int, version: int) -> None:
        """Drop one version that was found damaged; raises Fenced or Rewound if ``epoch`` does not own the shard."""
        (head,) = self.heads(job, [shard])
        self._drop(job, head, epoch, lambda each: each == version)

    def _drop(self, job: str, head: Head, epoch: int, unwanted: Callable[[int], bool]) -> None:
        where = f"job {job!r}, shard {head.shard}"
        for _ in range(_TRIES_MAX):
            gone = [each for each in head.manifests if unwanted(each.version)]
            if not gone:
                return
            reply = self._function(
                "psa_drop",
                [keys.head(job, head.shard), *(key for each in gone for key in each.chunk_keys(job, head.shard))],
                [epoch_text(epoch), *_identities(gone)],
            )
            match reply[0]:
                case b"ok":
                    return
                case b"fenced":
                    raise Fenced(f"{where}: epoch {int(reply[1], 16)} owns it, ours is {epoch}")
                case b"rewound":
                    raise Rewound(f"{where}: Redis lost the seal of epoch {epoch}")
            (head,) = self.heads(job, [head.shard])
        raise self._unsettled(job, head.shard, f"versions {[each.version for each in gone]} could not be dropped")

    def load(self, job: str, shard: int, manifest: Manifest, into: Mapping[str, memoryview]) -> None:
        """Read sections straight into the given memory and check their digests.

        Raises:
            DataIntegrity: a chunk is missing, has another length or another digest; names it.
        """
        wanted: list[tuple[str, memoryview, str, str]] = []
        for section in manifest.sections:
            if section.name not in into:
                continue
            place = into[section.name].cast("B")
            where = f"job {job!r}, shard {shard}, version {manifest.version}, section {section.name}"
            if len(place) != section.size_bytes:
                raise DataIntegrity(f"{where}: {section.size_bytes} bytes stored, {len(place)} expected")
            for index, (part, digest) in enumerate(zip(_chunks(place), section.digests, strict=True)):
                key = keys.chunk(job, shard, manifest.version, manifest.epoch, manifest.nonce, section.name, index)
                wanted.append((key, part, digest, f"{where}, chunk {index}"))
        with translated(self._url):
            found = self._retrying(lambda: read_into(self._pool, [(key, part) for key, part, _, _ in wanted]))
        for (_, part, digest, where), problem in zip(wanted, found, strict=True):
            if problem:
                raise DataIntegrity(f"{where}: {problem}")
            if xxh3_128_hexdigest(part) != digest:
                raise DataIntegrity(f"{where}: damaged, its digest does not match")

    # --- calling

    def _function(self, name: str, its_keys: list[str], args: Sequence[Any]) -> list[Any]:
        return list(self._functions([(name, its_keys, args)])[0])

    def _functions(self, calls: Sequence[tuple[str, list[str], Sequence[Any]]]) -> list[Any]:
        """Call functions in one round trip; loads the library first if somebody flushed it."""

        def attempt() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for name, its_keys, args in calls:
                pipeline.fcall(name, len(its_keys), *its_keys, *args)
            return list(pipeline.execute())

        with translated(self._url):
            try:
                return self._retrying(attempt)
            except redis.exceptions.ResponseError as error:
                if "Function not found" not in str(error):
                    raise
            self._load_library()
            return self._retrying(attempt)

    def _load_library(self) -> None:
        """Load our functions, unless exactly these are loaded."""
        marked = self._library + f"-- {hashlib.sha256(self._library.encode()).hexdigest()}\n"
        with translated(self._url):
            try:
                listed = self._retrying(lambda: self._client.function_list(library="psa_store", withcode=True))
                if marked.encode() not in _flatten(listed):
                    self._retrying(lambda: self._client.function_load(marked, replace=True))
            except redis.exceptions.ResponseError as error:
                if "unknown command" not in str(error).lower():
                    raise
                raise DependencyUnfit(
                    f"Redis at {printable(self._url)} has no functions: use Redis 7.0 or newer, or Valkey"
                ) from error

    def _retrying(self, operation: Callable[[], T]) -> T:
        """Try an idempotent operation again while Redis is away or loading, until the time is over."""
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self._timeout_s),
            wait=tenacity.wait_fixed(_RETRY_PAUSE_S),
            retry=tenacity.retry_if_exception_type(
                (redis.exceptions.ConnectionError, redis.exceptions.BusyLoadingError)
            )
            & tenacity.retry_if_not_exception_type(redis.exceptions.AuthenticationError),
            reraise=True,
        )
        return retrying(operation)


def _identities(manifests: Iterable[Manifest]) -> list[str]:
    """Field and nonce of each, by which a function recognises what the caller has read."""
    return [part for each in manifests for part in (each.field, each.nonce)]


def _chunk_sizes(size_bytes: int) -> list[int]:
    return [min(CHUNK_BYTES, size_bytes - low) for low in range(0, size_bytes, CHUNK_BYTES)]


def _chunks(data: memoryview) -> list[memoryview]:
    flat = data.cast("B")
    return [flat[low : low + CHUNK_BYTES] for low in range(0, len(flat), CHUNK_BYTES)]


def _digest(arrays: Mapping[str, tuple[str, memoryview]]) -> tuple[Section, ...]:
    return tuple(
        Section(name, dtype, data.nbytes, tuple(xxh3_128_hexdigest(part) for part in _chunks(data)))
        for name, (dtype, data) in arrays.items()
    )


def _flatten(reply: Any) -> list[Any]:
    if isinstance(reply, dict):
        return [leaf for pair in reply.items() for item in pair for leaf in _flatten(item)]
    if isinstance(reply, (list, tuple)):
        return [leaf for item in reply for leaf in _flatten(item)]
    return [reply]
