"""Makes versions durable in the background: one thread, one commit of this server at a time.

Redis may be away: the committer tries again until it succeeds, is abandoned (the term is over) or is fenced. That Redis
went back in time or lost everything is the matter of :mod:`psa_store.server.healing`, which works in the same thread.

The snapshot belongs to the holder of the *reservation*: the event loop from :meth:`Committer.reserve` to
:meth:`Committer.submit` or :meth:`Committer.cancel`, the committer from there until it has posted the outcome.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress

from psa_store import logs
from psa_store.cluster import Cut
from psa_store.errors import DependencyUnfit, DependencyUnreachable, Fenced, PsaError, Rewound
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout
from psa_store.logs import Waits
from psa_store.observe.formatting import count
from psa_store.observe.metrics import Metrics
from psa_store.server.healing import Healing
from psa_store.server.messages import Committed, Lost
from psa_store.server.work import Work
from psa_store.storage import Manifest, RedisStore, ShardState
from psa_store.testing.failpoints import failpoint

_RETRY_PAUSE_S = 0.2
_REST = 11.0
"""A checkpoint that is not waited for is written in a twelfth of the time: steps feel what is written beside them."""
_WATCH_S = 1.0
"""How often an idle committer asks whether Redis is still the one it wrote to."""


class Committer:
    """Owns the thread ``psa-commit``. Other methods than :meth:`close` are called by the event loop's thread.

    ``rests``: whether the commit of a checkpoint takes its time, if it is not waited for.
    """

    def __init__(
        self,
        store: RedisStore,
        config: JobConfig,
        layout: Layout,
        post: Callable[[Committed | Lost], None],
        metrics: Metrics,
        waits: Waits,
        *,
        rests: bool,
    ) -> None:
        self._metrics = metrics
        self._waits = waits
        self._reserved_at_s = 0.0
        self._store = store
        self._job = config.name
        self._healing = Healing(store, config, layout, metrics)
        self._keep = config.versions_kept
        self._rests = rests
        self._post = post
        self._log = logs.get_logger()
        self._changed = threading.Condition()
        self._work: Work | None = None
        self._last: Work | None = None
        """What Redis is known to have, with its snapshots in memory."""
        self._begun_with: Work | None = None
        self._shards: tuple[int, ...] = ()
        """Those of the term."""
        self._reserved = False
        self._hurried = False
        """Whether the present commit is waited for."""
        self._term = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="psa-commit")
        self._thread.start()

    def reserve(self) -> bool:
        """Take the snapshot memory, if no commit is reading it. False: ask again after the next Committed."""
        with self._changed:
            if self._reserved:
                self._hurry()
                return False
            self._reserved = True
            self._reserved_at_s = time.monotonic()
            self._last = None  # its snapshot is about to be overwritten
            return True

    def hurry(self) -> None:
        """What is being committed is waited for."""
        with self._changed:
            self._hurry()

    def _hurry(self) -> None:
        self._hurried = True
        self._changed.notify_all()

    def submit(self, work: Work) -> None:
        """Commit a snapshot; the reservation passes to the committer."""
        with self._changed:
            assert self._reserved and self._work is None
            self._work = work
            self._hurried = False
            self._changed.notify_all()

    def cancel(self) -> None:
        """Give a reservation back without committing anything."""
        with self._changed:
            assert self._reserved and self._work is None
            self._reserved = False

    def begin(self, term: int) -> None:
        """Work of older terms is pointless from now on."""
        with self._changed:
            self._term = term
            self._last = self._begun_with = None
            self._shards = ()
            self._changed.notify_all()

    def adopt(self, work: Work) -> None:
        """Redis has this already, at the beginning of a term: see to it that it stays so."""
        with self._changed:
            self._begun_with = work
            self._shards = (*work.owned_shards, *work.frozen)
            if not self._reserved:
                self._last = work

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._work is not None, _WATCH_S)
                if self._closing:
                    return
                work, shards = self._work, self._shards
                watched = None if work or self._reserved else self._last
                self._reserved = self._reserved or watched is not None
            self._healing.keep_documents(shards)
            if work is not None:
                begun_s = self._reserved_at_s
                outcome = self._commit(work)
                self._waits.over("commit")
                with self._changed:
                    self._work = None
                    self._reserved = False
                    if work.term != self._term:
                        self._last = self._begun_with  # adopted meanwhile: its snapshots are not those of this work
                    else:
                        self._last = work if isinstance(outcome, Committed) else None
                    self._changed.notify_all()
                if isinstance(outcome, Committed):
                    self._metrics.set("commit_seconds", time.monotonic() - begun_s)
                if outcome is not None:
                    self._post(outcome)
            elif watched is not None:
                lost = self._heal(watched)
                with self._changed:
                    self._reserved = False
                    self._changed.notify_all()
                if lost is not None:
                    self._post(lost)

    def _heal(self, watched: Work) -> Lost | None:
        try:
            self._healing.heal(watched, lambda lost: self._write(lost, {}))
        except Exception as error:
            return _lost(watched, error)
        return None

    def _wanted(self, work: Work) -> bool:
        with self._changed:
            return not self._closing and work.term == self._term

    def _commit(self, work: Work) -> Committed | Lost | None:
        """Write all shards of ``work``; None if the term ended meanwhile."""
        try:
            return self._commit_all(work)
        except Exception as error:
            return _lost(work, error)

    def _commit_all(self, work: Work) -> Committed | None:
        manifests: dict[int, Manifest] = {}
        run_id = self._healing.read_run_id()  # before the first shard: a restart in mid-commit must be noticed
        pinned = None
        while True:
            if not self._wanted(work):
                return None
            try:
                if len(manifests) < len(work.owned_shards):
                    self._write(work, manifests)
                    continue
                if work.pin is not None:
                    pinned = self._pin(work, work.pin)
                lost = self._healing.acknowledge(work, manifests)
                if not lost:
                    break
                for index in lost:
                    work.owned_shards[index].committed = None
                    del manifests[index]
            except DependencyUnreachable as error:
                left = count(len(work.owned_shards) - len(manifests), "shard")
                self._metrics.add("commit_retries")
                self._waits.on(
                    "commit", f"Redis to commit version {work.version}", f"{left} left. {error}", say_after_s=0.0
                )
                if isinstance(error, DependencyUnfit):
                    self._make_room(work)
                with self._changed:
                    self._changed.wait(_RETRY_PAUSE_S)
        self._healing.committed_to(run_id)
        return Committed(work.term, work.version, manifests, pinned)

    def _make_room(self, work: Work) -> None:
        """Redis may refuse because something else lies where a head should be."""
        with suppress(DependencyUnreachable):
            self._healing.remove_foreign(work.owned_shards)

    def _pin(self, work: Work, cut: Cut) -> Cut | None:
        """Keep what was just committed for a checkpoint; None if Redis has lost it, which ends that attempt."""
        failpoint("checkpoint.before_pins")
        try:
            self._store.pin(self._job, work.owned_shards, work.version, cut.name, term=work.term)
        except Rewound as error:
            self._log.warning("not pinned", checkpoint=cut.name, why=str(error))
            return None
        failpoint("checkpoint.pinned")
        return cut

    def _write(self, work: Work, manifests: dict[int, Manifest]) -> None:
        """Commit the shards that ``manifests`` lacks, and put theirs into it; stops early if the term ends."""
        states = []
        for index, owned in work.owned_shards.items():
            if index not in manifests:
                expect = owned.committed.version if owned.committed else None
                states.append(ShardState(index, *owned.snapshot(), expect, work.extra))
        keep = self._keep
        paced = work.pin is not None and self._rests

        def rest(worked_s: float) -> None:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._hurried or self._closing or work.term != self._term, _REST * worked_s
                )

        commit = self._store.commit_each(
            self._job, work.term, work.version, states, keep=keep, pause=rest if paced else None
        )
        with closing(commit) as outcomes:
            for index, outcome in outcomes:
                owned = work.owned_shards[index]
                if isinstance(outcome, Rewound):
                    outcome = self._healing.write_over(work, index, outcome)
                if isinstance(outcome, Fenced):
                    raise outcome
                owned.committed = manifests[index] = outcome
                if not self._wanted(work):
                    return


def _lost(work: Work, error: Exception) -> Lost:
    """Whatever it is (Fenced, mostly), this term can not be committed: a take-over starts from Redis.

    An error that ended the thread instead would leave workers waiting for a commit that no one makes.
    """
    return Lost(work.term, str(error) if isinstance(error, PsaError) else repr(error))
