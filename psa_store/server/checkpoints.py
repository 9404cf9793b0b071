"""Checkpoints while training goes on: run by the controller, one at a time.

    asked for, or due ──▶ barrier opened, cut in the plan ──▶ all servers have committed and pinned it ──▶ document
          ▲                        │ a member is gone, too late, a new term, nothing moves, not wanted any more
          └────────────────────────┘ pins removed, tried again

The plan carries the cut, so that a controller that dies is followed by one that goes on from there; what it was asked
for lies in ZooKeeper until it is done. In a synchronous job the cut is a version some steps ahead, which every server
commits when it comes there; a server that is past it says so, and the next cut lies twice as far ahead. Where pushes
are applied on arrival, workers say where it is in their ranks (see ``consistency.arrivals``).

What is decided is in :mod:`psa_store.checkpoint.schedule`; here it is done.
"""

from __future__ import annotations

import time
from dataclasses import replace

from psa_store import logs
from psa_store.checkpoint import catalog
from psa_store.checkpoint.catalog import Checkpoint, CheckpointPolicy, Reason, tidy
from psa_store.checkpoint.files.archive import Archive
from psa_store.checkpoint.schedule import Patience, Schedule
from psa_store.checkpoint.take import announce, complete
from psa_store.cluster import Cut, Phase, Plan
from psa_store.coordination import Barrier, BarrierState, CheckpointRequest, Coordination, StoredPlan
from psa_store.errors import DataIntegrity, DependencyUnreachable, Disconnected, PsaError
from psa_store.job.config import JobConfig, is_name
from psa_store.job.document import Damaged
from psa_store.job.layout import Layout
from psa_store.observe import EventKind, Events
from psa_store.observe.metrics import Metrics
from psa_store.server.exporting import Exporter
from psa_store.storage import RedisStore
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Door, inspect

_INSPECT_S = 1.0


class Checkpoints:
    """The controller's part of every checkpoint. Used by the thread that follows the plan only."""

    def __init__(
        self,
        config: JobConfig,
        layout: Layout,
        store: RedisStore,
        coordination: Coordination,
        policy: CheckpointPolicy,
        metrics: Metrics,
        events: Events,
        door: Door,
    ) -> None:
        self._config = config
        self._job = config.name
        self._layout = layout
        self._store = store
        self._coordination = coordination
        self._policy = policy
        self._metrics = metrics
        self._events = events
        self._door = door
        self._log = logs.get_logger()
        self._schedule = Schedule(config, policy.every_s if layout.versioned else None)
        self._patience = Patience(config, barrier="")
        self._exporter: Exporter | None = None

    def close(self) -> None:
        """Finish what is being written to files."""
        if self._exporter is not None:
            self._exporter.close()

    def turn(self, seen: StoredPlan) -> None:
        """Do what can be done now. One action a turn, as with the plan itself.

        Whatever goes wrong with a checkpoint is logged, and is no reason to stop serving.

        Raises:
            DependencyUnreachable: Redis or ZooKeeper does not answer.
        """
        if self._schedule.rests(time.monotonic()):
            return
        try:
            if seen.plan.cut is not None:
                self._follow(seen, seen.plan.cut)
            elif seen.plan.phase is Phase.RUN and (name := self._requested()) is not None:
                self._begin_requested(seen, *name)
            elif seen.plan.phase is Phase.RUN and self._is_due():
                self._begin_due(seen)
        except (DependencyUnreachable, Disconnected):
            raise
        except PsaError as error:
            self._log.error("no checkpoint", why=str(error))
            self._failed()

    # --- beginning

    def _requested(self) -> tuple[str, CheckpointRequest] | None:
        """The next checkpoint that is asked for."""
        for name in self._coordination.checkpoint_requests(watch=True):
            request = self._coordination.read_checkpoint_request(name)
            if isinstance(request, Damaged):
                answer = CheckpointRequest(failed="its request could not be read: ask again")
                self._coordination.answer_checkpoint_request(name, answer)
            if not isinstance(request, CheckpointRequest) or request.failed or not is_name(name):
                continue
            if name not in catalog.read_job(self._store, self._job).checkpoints:
                return name, request
            self._coordination.withdraw_checkpoint_request(name)  # a controller died after it had taken it
        return None

    def _is_due(self) -> bool:
        if not self._schedule.knows_the_last:
            newest = self._newest()
            self._schedule.last_taken(time.time() if newest is None else newest.created_s)
            if newest is not None:
                self._export(newest.name)  # the controller before us may have died before it had
        return self._schedule.is_due(time.time())

    def _newest(self) -> Checkpoint | None:
        taken = catalog.read_job(self._store, self._job).checkpoints.values()
        return max(taken, key=lambda each: each.created_s, default=None)

    def _begin_requested(self, seen: StoredPlan, name: str, request: CheckpointRequest) -> None:
        attended = seen.plan.attended
        why = self._schedule.refusal(changes=bool(self._layout.versioned), attended=attended)
        if why is not None:
            self._coordination.answer_checkpoint_request(name, CheckpointRequest(failed=why))
        elif (version := self._reached(seen.plan)) is not None:
            target = self._schedule.version_to_cut(version, attended=attended, asked=True)
            self._open(seen, Cut(name, "", target, asked=True, named=request.named))

    def _begin_due(self, seen: StoredPlan) -> None:
        if not seen.plan.attended:
            self._schedule.last_taken(time.time())  # nothing moves
            return
        version = self._reached(seen.plan)
        if version is None:
            return
        newest = self._newest()
        if newest is not None and newest.version == version:
            self._schedule.last_taken(time.time())
            return
        name = catalog.automatic_name(self._store.read_checkpoints(self._job), time.time())
        self._open(seen, Cut(name, "", self._schedule.version_to_cut(version, attended=True, asked=False)))

    def _reached(self, plan: Plan) -> int | None:
        """Where training is; None if that cannot be seen now."""
        server = plan.servers[0]
        try:
            report = inspect(server.address, server.local, server.host, _INSPECT_S, self._door)
        except Disconnected as error:
            self._log.info("where training is, is not known", why=str(error))
            return None
        if report.version is None or report.term != plan.term:
            self._log.info("where training is, is not known", why=f"server {server.id} does not serve the term yet")
            return None
        return report.version

    def _open(self, seen: StoredPlan, cut: Cut) -> None:
        """In this order: what is announced is not removed by others, and only what the plan names is pinned."""
        catalog.sweep(self._store, self._job, self._layout)
        announce(self._store, self._job, cut.name)
        barrier = self._coordination.open_barrier(seen.plan.term, [server.id for server in seen.plan.servers])
        failpoint("checkpoint.opened")
        if self._publish(seen, replace(cut, barrier=barrier)):
            at = "as the ranks say" if cut.version is None else cut.version
            self._log.info("taking a checkpoint", checkpoint=cut.name, version=at)

    def _publish(self, seen: StoredPlan, cut: Cut | None) -> bool:
        changed = replace(seen.plan, revision=seen.plan.revision + 1, cut=cut)
        return self._coordination.write_plan(changed, seen) is not None

    # --- under way

    def _follow(self, seen: StoredPlan, cut: Cut) -> None:
        barrier = self._coordination.read_barrier(cut.barrier, watch=True)
        missed = barrier is not None and barrier.state is BarrierState.ABORTED  # by a server: it was told too late
        if barrier is not None and barrier.state is BarrierState.OPEN:
            expired = self._is_withdrawn(cut) or self._stands_still(seen.plan, cut)
            barrier = self._coordination.settle_barrier(cut.barrier, expired=expired)
        if barrier is not None and barrier.state is BarrierState.OPEN:
            return
        done = self._complete(seen.plan, cut, barrier)
        if done is None:
            why = barrier.reason if barrier is not None else "its barrier is gone"
            self._abort(cut, why or "it is waited for no longer", missed=missed)
        if self._publish(seen, None) and done is not None:
            failpoint("checkpoint.written")
            self._coordination.withdraw_checkpoint_request(cut.name)
            self._export(cut.name)
            tidy(self._store, self._job, self._layout, self._policy)

    def _is_withdrawn(self, cut: Cut) -> bool:
        """Whether it was asked for, and is no longer."""
        return cut.asked and self._coordination.read_checkpoint_request(cut.name) is None

    def _stands_still(self, plan: Plan, cut: Cut) -> bool:
        """Whether the time is over, and nothing has moved in it."""
        now_s = time.monotonic()
        if cut.barrier != self._patience.barrier:
            self._patience = Patience(self._config, cut.barrier, now_s)
        if not self._patience.is_over(now_s):
            return False
        return not self._patience.asks_for_progress or self._patience.stands_still(now_s, self._reached(plan))

    def _complete(self, plan: Plan, cut: Cut, barrier: Barrier | None) -> Checkpoint | None:
        """Make it a checkpoint; None if that cannot be any more."""
        if barrier is None or barrier.state is not BarrierState.DONE:
            return None
        failpoint("checkpoint.done")
        if self._is_withdrawn(cut):
            return None
        version = max(barrier.versions.values())
        reason = Reason.ASKED if cut.asked else Reason.INTERVAL
        try:
            done = complete(
                self._store,
                self._config,
                self._layout,
                cut.name,
                version,
                term=plan.term,
                reason=reason,
                named=cut.named,
            )
        except DataIntegrity as error:
            self._log.warning("a checkpoint lost its pins", checkpoint=cut.name, why=str(error))
            return None
        self._log.info("checkpoint", name=done.name, version=done.version, megabytes=round(done.bytes / 1e6, 1))
        self._metrics.add("checkpoints")
        self._metrics.set("checkpoint_time_seconds", done.created_s)
        text = f"checkpoint {done.name} of version {done.version}"
        self._events.note(EventKind.CHECKPOINT, text, term=plan.term, version=version)
        self._schedule.taken(time.time())
        return done

    def _abort(self, cut: Cut, why: str, *, missed: bool) -> None:
        """Leave nothing, and try again: from further ahead if a server was told too late, else after a rest."""
        self._log.warning("checkpoint aborted, to be tried again", checkpoint=cut.name, why=why)
        catalog.remove(self._store, self._job, self._layout, [cut.name])
        if missed:
            self._schedule.missed()
        else:
            self._failed()

    def _failed(self) -> None:
        self._metrics.add("checkpoint_failures")
        self._schedule.failed(time.monotonic())

    def _export(self, name: str) -> None:
        """Have a checkpoint written to files, if the policy says where."""
        if self._policy.files is None:
            return
        if self._exporter is None:
            archive = Archive(self._policy.files, self._job)
            self._exporter = Exporter(
                self._store,
                archive,
                self._policy.keep,
                self._policy.older_than_s,
                lambda text: self._events.note(EventKind.CHECKPOINT, text),
            )
        self._exporter.submit(name)
