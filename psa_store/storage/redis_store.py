"""The only way to Redis: job documents, the fence, commits, and loads. Thread-safe.

Every operation is idempotent, or made so (a commit carries a nonce), so that it may be tried again after an answer
was lost (see ``caller.py``), until ``timeout_s`` is over.

The class is a little longer than ours may be: it is one door, and what lies behind it are modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from psa_store.config import Settings
from psa_store.errors import DependencyUnfit, Fenced, JobMismatch
from psa_store.job.document import Damaged
from psa_store.logs import Account
from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.commit import Commit, Outcomes, ShardState
from psa_store.storage.connection import known_redis, text, translated
from psa_store.storage.data_record import StoredDataRecord
from psa_store.storage.documents import StoredDocuments
from psa_store.storage.erasing import erase, keys_of
from psa_store.storage.examination import RedisFacts, facts_of
from psa_store.storage.head import (
    TERMS_AHEAD_MAX,
    Head,
    Manifest,
    pin_field,
    term_text,
    version_field,
)
from psa_store.storage.head_reader import HeadReader
from psa_store.storage.loading import load_sections
from psa_store.storage.model_files import StoredModelFiles
from psa_store.storage.pins import Pins
from psa_store.storage.rehearsal import rehearse
from psa_store.testing.failpoints import failpoint


class RedisStore:
    """Versioned shards of jobs in one Redis.

    Args:
        url: see ``addresses.py``.
        timeout_s: how long one operation may take, its retries included.
        connections_max: connections that are open at the same time at most.
        replicas_acknowledge: how many replicas must have what is written before a call that writes returns; of a
            commit, :meth:`seal` afterwards tells.
        refuse_older: see :class:`HeadReader`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        connections_max: int = 8,
        replicas_acknowledge: int = 0,
        refuse_older: bool = False,
    ) -> None:
        self._url = url
        self.replicas_acknowledge = replicas_acknowledge
        self._caller = Caller(url, timeout_s, connections_max, replicas_acknowledge)
        self._client = self._caller.client
        self.account = Account[Damaged]("what is stored")
        self._heads = HeadReader(self._caller, self.set_aside, refuse_older=refuse_older)

    @classmethod
    def from_settings(cls, settings: Settings) -> RedisStore:
        """For the Redis of the settings; raises UsageError if they do not say where it is."""
        return cls(
            known_redis(settings),
            timeout_s=settings.connect_timeout_s,
            replicas_acknowledge=settings.replicas_acknowledge,
        )

    @property
    def where(self) -> str:
        """Its address, without the password."""
        return self._caller.where

    @property
    def acknowledged(self) -> int:
        """How many have acknowledged the newest."""
        return self._caller.acknowledged

    def close(self) -> None:
        self._caller.close()

    def __enter__(self) -> RedisStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Make sure that Redis is there and safe to use, and that it has our functions.

        Raises:
            DependencyUnreachable: no answer within ``timeout_s``.
            DependencyUnfit: it evicts keys, is a node of a cluster, or has neither functions nor scripts.
        """
        info = self._caller.retrying(lambda: self._client.info())
        if info.get("cluster_enabled"):
            raise DependencyUnfit(
                f"Redis at {self._caller.where} is a node of a cluster, and psa keeps a job in one Redis: "
                "point PSA_REDIS at one without cluster mode, for failover with Sentinels"
            )
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise DependencyUnfit(
                f"Redis at {self._caller.where} has maxmemory-policy {policy}: it may throw parameters away. "
                "Set `maxmemory-policy noeviction` in its configuration."
            )
        self._caller.load_library()

    def rehearse(self) -> None:
        """Do once what a job does; raises DependencyUnfit naming what is refused. Takes about fifty round trips."""
        rehearse(self, self._caller)

    def has_other_functions(self) -> bool:
        """Whether functions of another release are loaded, which a job may be using."""
        with translated(self._url):
            return self._caller.loaded_library() is False

    def server_run_id(self) -> str:
        """Changes when Redis restarts or another instance takes over."""
        with translated(self._url):
            return str(self._client.info("server")["run_id"])

    def facts(self) -> RedisFacts:
        """What it is like now; raises DependencyUnreachable if it does not answer within ``timeout_s``."""
        return facts_of(self._caller)

    # --- jobs

    def create_job(self, job: str, config_json: str, layout_json: str) -> None:
        """Store a job's documents; raises JobMismatch if others are stored under this name."""
        # Listed first: a job that is listed but does not exist is skipped by jobs(), the reverse could not be found.
        self._caller.retrying(lambda: self._client.sadd(keys.JOBS, job))
        its_keys = [keys.config(job), keys.layout(job)]
        (stored,) = self._caller.functions([("psa_create", its_keys, [config_json, layout_json])])
        if [text(each) for each in stored] != [config_json, layout_json]:
            raise JobMismatch(f"job {job!r} was created by another process at the same time: run again to join it")

    def replace_config(self, job: str, before: str, after: str, fence: tuple[int, int] | None = None) -> bool:
        """Put another configuration in place of exactly this one; False if there is another, or a newer term.

        ``fence``: a shard and the term that sealed it. A term seals all shards before any process is told of it, so
        one that begins later finds the new configuration.
        """
        documents, arguments = [keys.config(job)], [before, after]
        if fence is not None:
            documents.append(keys.head(job, fence[0]))
            arguments.append(term_text(fence[1]))
        (reply,) = self._caller.functions([("psa_replace", documents, arguments)])
        return bool(reply[0] == b"ok")

    def read_job(self, job: str) -> tuple[str, str] | None:
        """The job's configuration and layout as they were created; None if there is no such job."""
        found: list[Any] = self._caller.retrying(lambda: self._client.mget(keys.config(job), keys.layout(job)))
        return (text(found[0]), text(found[1])) if found[0] and found[1] else None

    def data_record(self, job: str) -> StoredDataRecord:
        """The document that says how the job walks through its data."""
        return StoredDataRecord(self._caller, job)

    def documents(self, job: str) -> StoredDocuments:
        """The two documents of :meth:`read_job`, one by one, for a process that writes them again."""
        return StoredDocuments(self._caller, job, self.set_aside)

    def model_files(self, job: str) -> StoredModelFiles:
        """The small files of the job's model."""
        return StoredModelFiles(self._caller, job)

    def has_job(self, job: str) -> bool:
        """Whether :meth:`read_job` would find it."""
        return bool(self._caller.retrying(lambda: self._client.exists(keys.config(job), keys.layout(job))) == 2)

    def jobs(self) -> list[str]:
        names = sorted(map(text, self._caller.retrying(lambda: self._client.smembers(keys.JOBS))))
        exist = self._pipelined([("EXISTS", keys.config(name)) for name in names])
        return [name for name, there in zip(names, exist, strict=True) if there]

    def delete_job(self, job: str, n_shards: int) -> None:
        """Remove everything of a job. Nothing may be running on it."""
        for head in self.heads(job, range(n_shards)):
            gone = head.freed(job, list(head.entries()))
            self._caller.retrying(partial(self._client.unlink, keys.head(job, head.shard), *gone))
        self._caller.retrying(lambda: self._client.unlink(*keys.documents(job)))
        self._caller.retrying(lambda: self._client.srem(keys.JOBS, job))

    def erase_job(self, job: str) -> tuple[int, int]:
        """Remove every key that has the job's name, however damaged; returns how many, and their bytes in Redis."""
        return erase(self._caller, job)

    def has_traces(self, job: str) -> bool:
        """Whether there is any key that has the job's name."""
        return bool(keys_of(self._caller, job))

    # --- the fence

    def seal(self, job: str, shards: Iterable[int], term: int, layout: str) -> list[Head]:
        """Refuse commits of lower terms from now on; returns the heads, which only ``term`` can change now.

        Raises:
            Fenced: a head has a higher term. Some others may be sealed at ours.
        """
        listed = list(shards)
        arguments = [term_text(term), layout, term_text(term + TERMS_AHEAD_MAX)]
        calls = [("psa_seal", [keys.head(job, shard)], arguments) for shard in listed]
        heads = []
        for shard, reply in zip(listed, self._caller.functions(calls), strict=True):
            if reply[0] == b"fenced":
                raise Fenced(f"job {job!r}, shard {shard}: sealed at term {int(reply[1], 16)}, not {term}")
            flat = reply[1]
            heads.append(self._heads.head(job, shard, dict(zip(flat[::2], flat[1::2], strict=True))))
        return heads

    def missing(self, job: str, shards: Iterable[int]) -> list[int]:
        """Those of which nothing is known, as after a wipe. Cheaper than reading their heads."""
        listed = list(shards)
        exist = self._pipelined([("EXISTS", keys.head(job, shard)) for shard in listed])
        return [shard for shard, there in zip(listed, exist, strict=True) if not there]

    def heads(self, job: str, shards: Iterable[int]) -> list[Head]:
        """What is committed, without changing anything."""
        return self._heads.read(job, shards)

    # --- what is damaged

    def set_aside(self, damaged: Damaged) -> None:
        """Note what can not be read."""
        self.account.note(damaged, damaged, where=damaged.where, why=damaged.why)

    def remove_foreign(self, job: str, shards: Iterable[int]) -> bool:
        """Remove keys of another type than ours, under which nothing can be kept; whether there were any."""
        kinds = keys.kinds(job, shards)
        replies = self._caller.functions(
            [("psa_remove_foreign", [key], [kind]) for key, kind in kinds.items()], durable=False
        )
        foreign = {key: text(reply) for key, reply in zip(kinds, replies, strict=True) if reply is not None}
        for key, kind in foreign.items():
            self.set_aside(Damaged(key, f"it was a {kind} instead of a {kinds[key]}, and is removed"))
        return bool(foreign)

    # --- versions

    def commit(
        self,
        job: str,
        shard: int,
        term: int,
        version: int,
        arrays: Mapping[str, tuple[str, memoryview]],
        scalars: Mapping[str, float | int],
        *,
        keep: int,
        expect: int | None,
    ) -> Manifest:
        """Make one version of a shard durable: write its chunks, then flip the head, if ``term`` still owns it.

        Args:
            arrays: section name -> (dtype, bytes); the memory must not change until this returns.
            keep: how many versions the head keeps; older ones are dropped in the same flip.
            expect: the version that the caller committed last, None if it knows of none.

        Raises:
            Fenced: a newer term owns the shard. Nothing was changed.
            Rewound: Redis does not know what we committed before: it went back in time. Nothing was changed.
            DependencyUnreachable: Redis does not answer; whether the version is committed is unknown. Try again.
        """
        state = ShardState(shard, arrays, scalars, expect)
        ((_, outcome),) = list(self.commit_each(job, term, version, [state], keep=keep))
        if isinstance(outcome, Manifest):
            return outcome
        raise outcome

    def commit_each(
        self,
        job: str,
        term: int,
        version: int,
        states: Sequence[ShardState],
        *,
        keep: int,
        pause: Callable[[float], None] | None = None,
    ) -> Outcomes:
        """Commit one version of many shards in one stream; yields each shard when it is done or refused.

        Every shard stands for itself, as with :meth:`commit`: a refusal is its outcome, and the others go on. A caller
        that stops early closes the iterator; shards that were not yielded may be committed then, or not.

        Args:
            pause: called before every chunk but the first, with the seconds of work since it was called last; it may
                wait, far less than a chunk lives that no head names yet.

        Raises:
            DependencyUnreachable: Redis does not answer; whether the shards not yielded so far are committed is
                unknown. Try these again.
        """
        commit = Commit(self._caller, lambda shards: self.heads(job, shards), job, term, version, keep, pause)
        return commit.outcomes(states)

    def trim(self, job: str, shards: Iterable[int], term: int, newest: int) -> None:
        """Drop versions newer than ``newest``, and damaged ones; raises Fenced or Rewound unless ``term`` owns all."""
        newer = _versions(lambda version: version > newest)
        self._pins(job).drop(shards, lambda head: [*newer(head), *head.damaged_versions], term)

    def mark_corrupt(self, job: str, shard: int, term: int, version: int) -> None:
        """Drop one version that was found damaged; raises Fenced or Rewound if ``term`` does not own the shard."""
        self._pins(job).drop([shard], _versions(lambda each: each == version), term)

    # --- checkpoints

    def pin(self, job: str, shards: Iterable[int], version: int, name: str, *, term: int | None = None) -> None:
        """Keep ``version`` of these shards under a name, whatever is committed later. Replaces what the name kept.

        Args:
            term: refuse unless it owns the shards; None: whatever term does.

        Raises:
            Fenced, Rewound: ``term`` does not own a shard, or the version is gone. Some others may be pinned.
        """
        self._pins(job).copy(shards, lambda _: (version_field(version), pin_field(name)), term)

    def share(self, job: str, nonces: Mapping[int, str], name: str) -> None:
        """Keep, under a name, those versions of these shards that have these nonces, wherever they are named now.

        Raises:
            Rewound: a shard has none with its nonce any more.
        """

        def fields(head: Head) -> tuple[str, str]:
            named = [each for each, manifest in head.entries().items() if manifest.nonce == nonces[head.shard]]
            return named[0] if named else f"a version of nonce {nonces[head.shard]}", pin_field(name)

        self._pins(job).copy(nonces, fields, None)

    def unpin(self, job: str, shards: Iterable[int], names: Collection[str]) -> None:
        """Keep no longer what these names keep; what nothing else names is removed. Idempotent."""
        fields = [pin_field(name) for name in names]
        self._pins(job).drop(
            shards, lambda head: [f for f in fields if f in head.entries() or f.encode() in head.damaged]
        )

    def unwind(self, job: str, shards: Sequence[int], term: int, version: int, name: str | None) -> None:
        """Make ``version`` the newest of these shards, as ``name`` keeps it (None: as it is stored).

        First it is put in its place everywhere, only then is what is newer dropped: a caller that is cut off in between
        has changed nothing, or is done in all that matters.

        Raises:
            Fenced, Rewound: ``term`` does not own a shard, or it has not got this version.
        """
        failpoint("rollback.begun")
        if name is not None:
            self._pins(job).copy(shards, lambda _: (pin_field(name), version_field(version)), term)
        failpoint("rollback.restored")
        self.trim(job, shards, term, version)

    def write_checkpoint(self, job: str, name: str, document: str) -> None:
        """Store what is known of a checkpoint, or replace it."""
        self._caller.retrying(lambda: self._client.hset(keys.checkpoints(job), name, document))

    def read_checkpoints(self, job: str) -> dict[str, str]:
        """The documents of all checkpoints, by name."""
        found: Mapping[Any, Any] = self._caller.retrying(lambda: self._client.hgetall(keys.checkpoints(job)))
        return {text(name): text(document) for name, document in found.items()}

    def forget_checkpoints(self, job: str, names: Collection[str]) -> None:
        """Remove documents. Idempotent."""
        if names:
            self._caller.retrying(lambda: self._client.hdel(keys.checkpoints(job), *names))

    def adopt(self, job: str, shard: int, manifest: Manifest, term: int) -> None:
        """Let a shard of ``job`` have a version whose chunks are stored already, as those of ``manifest.home``.

        Raises:
            Fenced, Rewound: ``term`` does not own the shard.
        """
        self._pins(job).write(shard, manifest.field, manifest, term)

    def load(self, job: str, shard: int, manifest: Manifest, into: Mapping[str, memoryview]) -> None:
        """Read sections straight into the given memory and check their digests.

        Raises:
            DataIntegrity: a chunk is missing, has another length or another digest; names it.
        """
        load_sections(self._caller, job, shard, manifest, into)

    def _pins(self, job: str) -> Pins:
        return Pins(self._caller, partial(self.heads, job), job)

    def _pipelined(self, commands: Sequence[tuple[str, str]]) -> list[Any]:
        """Reads in one round trip: a command and its key each."""
        return self._caller.retrying(lambda: self._caller.pipelined(commands))


def _versions(unwanted: Callable[[int], bool]) -> Callable[[Head], list[str]]:
    return lambda head: [each.field for each in head.manifests if unwanted(each.version)]
