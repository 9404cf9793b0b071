"""When Redis is restarted, fails over or is wiped, and has lost what this server made durable: it is written again.

Redis may come back older than it was (a lost tail of the log, a replica that was behind), or empty. Then the seal is
renewed and the newest committed version is written again from the snapshot that is still in memory, or the one at which
the term began, so that the loss heals within about a second and not with the next commit. What hardly ever changes (the
documents of the job, its frozen shards, how it walks through its data, small files of its model) is written again as
well where it is missing.

What another process wrote over the documents of the job is found within a few seconds, also between commits, and
written again from what this server knows.

Used by the committer's thread, which holds the snapshots meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from psa_store import logs
from psa_store.errors import DataIntegrity, DependencyUnreachable, PsaError, Rewound
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.document import Damaged, judged
from psa_store.job.layout import Layout
from psa_store.job.model_files import ModelFiles
from psa_store.job.position import DataRecord
from psa_store.observe.metrics import Metrics
from psa_store.server.work import Work
from psa_store.storage import Head, Manifest, RedisStore, keys, newest_term

_DOCUMENTS_S = 2.0
"""How often the documents of the job are looked at."""
_HEADS_S = 2.0
"""How often the versions that Redis should have are looked at while nothing is committed."""


class Healing:
    """Remembers to which Redis, by its run id, the newest version was written."""

    def __init__(self, store: RedisStore, config: JobConfig, layout: Layout, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        metrics.set("replicas_acknowledge", store.replicas_acknowledge)
        self._job = config.name
        self._documents = config.to_json(), layout.to_json()
        self._layout = layout
        self._documents_at_s = self._heads_at_s = float("-inf")
        """When they are looked at next."""
        self._keep = config.versions_kept
        self._log = logs.get_logger()
        self._run_id: str | None = None
        self._stored = store.documents(config.name)
        self._stored_data = store.data_record(config.name)
        self._data: DataRecord | None = None
        """How the job walks through its data, as far as this server knows."""
        self._stored_files = store.model_files(config.name)
        self._files: ModelFiles | None = None
        self._files_digest = ""

    def read_run_id(self) -> str | None:
        """Ask Redis which one it is; None if it does not answer."""
        try:
            return self._store.server_run_id()
        except DependencyUnreachable:
            return None

    def committed_to(self, run_id: str | None) -> None:
        """A version is durable in the Redis that had this run id before its first shard was written."""
        self._run_id = run_id

    def heal(self, last: Work, write: Callable[[Work], None]) -> None:
        """If Redis lost the last commit, ``write`` again what is missing of it. Without an answer nothing happens.

        Another server may have noticed a wipe before this one, and written the documents: the own shards tell.

        Raises:
            PsaError: this term cannot be committed any more.
        """
        try:
            run_id = self._store.server_run_id()
            self._keep_documents([*last.owned_shards, *last.frozen])
            if run_id == self._run_id and self._has_all(last):
                return
            self._restore_what_never_changes(last)
            heads = self._store.seal(self._job, last.owned_shards, last.term, self._layout.fingerprint)
            lost = {head.shard: last.owned_shards[head.shard] for head in heads if head.manifest(last.version) is None}
            self._say_lost([head for head in heads if head.shard in lost], last.version)
            for owned in lost.values():
                owned.committed = None
            write(replace(last, owned_shards=lost))
            self._run_id = run_id
        except DependencyUnreachable:
            return

    def keep_documents(self, shards: Collection[int]) -> None:
        """Write documents again that are damaged; does nothing if it has just been called. Without an answer neither.

        Args:
            shards: those of this server. While Redis has them, it was not wiped, and documents that are missing were
                deleted: they are written again as well.
        """
        if time.monotonic() < self._documents_at_s:
            return
        try:
            self._store.server_run_id()  # asked once, where the others are tried again
            self._keep_documents(shards)
        except PsaError:
            return  # it is not what this server is for: nothing waits for it
        except Exception as error:  # what another program wrote may be anything, and commits must go on
            self._log.warning("the documents of the job can not be looked at", error=repr(error))
        finally:
            self._documents_at_s = time.monotonic() + _DOCUMENTS_S

    def _keep_documents(self, shards: Collection[int]) -> None:
        self.remove_foreign(shards)
        if shards and not self._store.has_job(self._job) and not self._store.missing(self._job, shards):
            self._stored.restore(*self._documents)
        self._keep_config()
        self._stored.keep_layout(self._layout)
        self._keep_data()
        self._keep_files()
        self._documents_at_s = time.monotonic() + _DOCUMENTS_S

    def remove_foreign(self, shards: Collection[int]) -> None:
        """Make room where another program keeps something under a key of the job."""
        self._store.remove_foreign(self._job, shards)

    def acknowledge(self, work: Work, manifests: Mapping[int, Manifest]) -> list[int]:
        """Wait until as many replicas as are to acknowledge a version have it, where that is any.

        Returns:
            Those shards that Redis does not have so any more, because it failed over meanwhile: write them again.

        Raises:
            DependencyUnfit: too few have acknowledged it. Try again.
        """
        if not self._store.replicas_acknowledge:
            return []
        # The heads are those of the server that waited for its replicas, as they were before it did.
        heads = self._store.seal(self._job, manifests, work.term, self._layout.fingerprint)
        lost = [head for head in heads if not head.names(manifests[head.shard])]
        self._say_lost(lost, work.version)
        self._metrics.set("replicas_acknowledged", self._store.acknowledged)
        return [head.shard for head in lost]

    def _say_lost(self, heads: Sequence[Head], version: int) -> None:
        """Say in numbers what Redis has lost of that version of these shards."""
        if heads:
            newest = min(max((each.version for each in head.manifests), default=0) for head in heads)
            self._metrics.add("lost_steps", max(0, version - newest))
            self._log.warning(
                "Redis lost a committed version: writing it again from memory",
                version=version,
                newest_there=newest,
                steps_lost=max(0, version - newest),
                shards=[head.shard for head in heads],
            )

    def write_over(self, work: Work, index: int, error: Rewound) -> Manifest:
        """Commit one shard to a Redis that went back in time: under a new seal, and whatever it holds."""
        self._log.warning("Redis went back in time", error=str(error))
        self._restore_what_never_changes(work)
        heads = self._store.seal(self._job, [index], work.term, self._layout.fingerprint)
        owned = work.owned_shards[index].committed
        self._say_lost(heads, work.version if owned is None else owned.version)
        snapshot = work.owned_shards[index].snapshot()
        return self._store.commit(self._job, index, work.term, work.version, *snapshot, keep=self._keep, expect=None)

    def _keep_config(self) -> None:
        """Write it again if it is damaged. Changes since this server began are in ZooKeeper, and brought after it."""
        stored = self._stored.config()
        found = None if stored is None else judged(job_config_from_json, stored, keys.config(self._job))
        if isinstance(found, Damaged):
            self._store.set_aside(found)
            self._stored.overwrite(config=self._documents[0])

    def _keep_data(self) -> None:
        """Remember the record, or write it again."""
        seen, found = self._stored_data.look()
        if isinstance(found, DataRecord):
            self._data = found
        elif self._data is not None:
            if found is not None:
                self._store.set_aside(found)
            self._stored_data.replace(seen, self._data)

    def _keep_files(self) -> None:
        """The same for the small files of the model: they are read when their digest is another one."""
        digest = self._stored_files.digest()
        if digest == self._files_digest:
            return
        found = None
        with suppress(DataIntegrity):
            found = self._stored_files.read()
        if found is not None and found.digest == digest:
            self._files, self._files_digest = found, digest
        elif self._files is not None:
            self._stored_files.write(self._files)

    def _has_all(self, work: Work) -> bool:
        """Whether Redis has the job and its shards, and, looked at less often, also their versions and our term.

        Under a later term they are not ours to write.
        """
        shards = [*work.owned_shards, *work.frozen]
        if not self._store.has_job(self._job) or self._store.missing(self._job, shards):
            return False
        now_s = time.monotonic()
        if now_s < self._heads_at_s:
            return True
        self._heads_at_s = now_s + _HEADS_S
        heads = self._store.heads(self._job, shards)
        return newest_term(heads, work.term) > work.term or all(
            head.manifest(0 if head.shard in work.frozen else work.version) is not None and head.term == work.term
            for head in heads
        )

    def _restore_what_never_changes(self, work: Work) -> None:
        """Write the documents and the frozen shards again if Redis was wiped: no later commit contains them."""
        lost = [head.shard for head in self._store.heads(self._job, work.frozen) if head.manifest(0) is None]
        self._store.seal(self._job, lost, work.term, self._layout.fingerprint)
        for index in lost:
            owned = work.frozen[index]
            owned.take_snapshot()
            arrays, _ = owned.snapshot()  # without scalars, as its creator wrote it
            owned.committed = self._store.commit(
                self._job, index, work.term, 0, arrays, {}, keep=self._keep, expect=None
            )
        if not self._store.has_job(self._job):
            self._log.warning("Redis lost the job: writing it again from memory", job=self._job)
            self._stored.restore(*self._documents)
