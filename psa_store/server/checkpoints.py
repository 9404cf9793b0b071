"""Checkpoints while training goes on: run by the controller, one at a time.

    asked for, or due ──▶ barrier opened, cut in the plan ──▶ all servers have committed and pinned it ──▶ document
          ▲                        │ a member is gone, too late, a new term, nothing moves, nobody waits any more
          └────────────────────────┘ pins removed, tried again

The plan carries the cut, so that a controller that dies is followed by one that goes on from there; what it was asked
for lies in ZooKeeper until it is done. In a synchronous job the cut is a version some steps ahead, which every server
commits when it comes there; a server that is past it says so, and the next cut lies twice as far ahead. On arrival,
workers say where it is in their ranks (see ``consistency.arrivals``).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

from psa_store import logs
from psa_store.checkpoint import catalog
from psa_store.checkpoint.catalog import Reason
from psa_store.checkpoint.files.archive import Archive
from psa_store.checkpoint.request import CheckpointRequest, request_from_json
from psa_store.cluster import NOBODY, Cut, Phase, Plan, plan_from_json
from psa_store.coordination import BarrierState, Coordination, Versioned
from psa_store.errors import DataIntegrity, DependencyUnreachable, Disconnected, PsaError
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout
from psa_store.observe import EventKind, Events
from psa_store.observe.metrics import Metrics
from psa_store.server.exporting import Exporter
from psa_store.storage import RedisStore
from psa_store.testing.failpoints import failpoint
from psa_store.wire import inspect

_PATIENCE_S = 600.0
"""An attempt is over when training has not moved for so long. Who dies ends it at once."""
_PATIENCE_ON_ARRIVAL_S = 30.0
_INSPECT_S = 1.0
_LEAD = 2
_LEAD_MAX = 1 << 14
_REST_S = 5.0
_REST_MAX_S = 300.0
_END = "checkpoint-at-end"
"""Name that one of the servers that leave last holds in ZooKeeper."""


@dataclass(frozen=True, slots=True)
class Policy:
    """When checkpoints are taken by themselves, how many of these are kept, and where else all of them go."""

    every_s: float | None
    keep: int
    older_than_s: float | None
    files: str | None

    @property
    def automatic(self) -> bool:
        return self.every_s is not None


class Checkpoints:
    """The controller's care for checkpoints. Used by control's thread only."""

    def __init__(
        self,
        config: JobConfig,
        layout: Layout,
        store: RedisStore,
        coordination: Coordination,
        policy: Policy,
        metrics: Metrics,
        events: Events,
    ) -> None:
        self._metrics = metrics
        self._events = events
        self._config = config
        self._job = config.name
        self._layout = layout
        self._store = store
        self._coordination = coordination
        self._policy = policy
        self._log = logs.get_logger()
        self._lead = _LEAD
        self._rest_s = _REST_S
        self._rest_until_s = 0.0
        self._barrier = ""
        self._deadline_s = 0.0
        self._reached = -1
        """The version at the last deadline of the present attempt."""
        self._due_at_s: float | None = None
        """By the clock of the wall, since others may have taken the last one; None: not known yet."""
        self._exporter: Exporter | None = None

    def close(self) -> None:
        """Finish what is being written to files."""
        if self._exporter is not None:
            self._exporter.close()

    def turn(self, seen: Versioned, plan: Plan) -> None:
        """Do what can be done now. One action a turn, as with the plan itself.

        Whatever goes wrong with a checkpoint is told, and is no reason to stop serving.

        Raises:
            DependencyUnreachable: Redis or ZooKeeper does not answer.
        """
        if time.monotonic() < self._rest_until_s:
            return
        try:
            if plan.cut is not None:
                self._follow(seen, plan, plan.cut)
            elif plan.phase is Phase.RUN and (wanted := self._wanted()) is not None:
                self._begin(seen, plan, *wanted)
        except (DependencyUnreachable, Disconnected):
            raise
        except PsaError as error:
            self._log.error("no checkpoint", why=str(error))
            self._rest()

    def _rest(self) -> None:
        """Leave training alone for a while, after each failure in a row for longer."""
        self._metrics.add("checkpoint_failures")
        self._rest_until_s = time.monotonic() + self._rest_s
        self._rest_s = min(2 * self._rest_s, _REST_MAX_S)

    def _export(self, name: str) -> None:
        """Have a checkpoint written to files, if that is wanted."""
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

    # --- wanted

    def _wanted(self) -> tuple[str, CheckpointRequest | None] | None:
        """The next checkpoint to take; without a wish, one that is due."""
        for name in self._coordination.checkpoint_requests(watch=True):
            request = self._request(name)
            if request is None or request.failed:
                continue
            if name in catalog.read_job(self._store, self._job).checkpoints:
                self._coordination.withdraw_checkpoint_request(name)  # a controller died after it had taken it
                continue
            return name, request
        if self._policy.every_s is None or not self._layout.versioned:
            return None
        if self._due_at_s is None:
            newest = self._newest()
            self._due_at_s = (time.time() if newest is None else newest.created_s) + self._policy.every_s
            if newest is not None:
                self._export(newest.name)  # the controller before us may have died before it had
        if time.time() < self._due_at_s:
            return None
        return catalog.automatic_name(self._store.read_checkpoints(self._job), time.time()), None

    def _request(self, name: str) -> CheckpointRequest | None:
        found = self._coordination.read_checkpoint_request(name)
        return None if found is None else request_from_json(found.text)

    def _newest(self) -> catalog.Checkpoint | None:
        taken = catalog.read_job(self._store, self._job).checkpoints.values()
        return max(taken, key=lambda each: each.created_s, default=None)

    # --- an attempt

    def _begin(self, seen: Versioned, plan: Plan, name: str, request: CheckpointRequest | None) -> None:
        attended = any(holder != NOBODY for holder in plan.ranks)
        if request is None and not attended:
            self._next_is_due()  # nothing moves
            return
        if request is not None and not self._layout.versioned:
            self._refuse(name, "nothing in this job ever changes")
            return
        if request is not None and self._config.mode.on_arrival and not attended:
            self._refuse(name, "no worker holds a rank, to say where it ends. Stop the servers, and repeat")
            return
        try:
            version = self._version(plan)
        except Disconnected as error:
            self._log.info("no checkpoint yet", why=str(error))
            return
        newest = self._newest() if request is None else None
        if newest is not None and newest.version == version:
            self._next_is_due()
            return
        catalog.sweep(self._store, self._job, self._layout)
        catalog.announce(self._store, self._job, name)
        target = None if self._config.mode.on_arrival else self._ahead(version, attended, regular=request is None)
        barrier = self._coordination.open_barrier(plan.term, [server.id for server in plan.servers])
        failpoint("checkpoint.opened")
        cut = Cut(name, barrier, target, asked=request is not None, named=request is not None and request.named)
        changed = replace(plan, revision=plan.revision + 1, cut=cut)
        if self._coordination.write_plan(changed.to_json(), seen.version) is not None:
            self._log.info(
                "taking a checkpoint", checkpoint=name, version="as the ranks say" if target is None else target
            )

    def _version(self, plan: Plan) -> int:
        """Where training is; raises Disconnected if nobody tells."""
        server = plan.servers[0]
        report = inspect(server.address, server.local, server.host, _INSPECT_S)
        if report["version"] is None or report["term"] != plan.term:
            raise Disconnected(f"server {server.id} does not serve term {plan.term} yet")
        return int(report["version"])

    def _ahead(self, version: int, attended: bool, *, regular: bool) -> int:
        """A version that no server has reached, if the own is enough.

        One that nobody waits for takes the next regular commit, so that it costs nothing at all.
        """
        interval = self._config.commit_interval
        grid = interval if interval and (self._config.ranks_stay or regular) else 1
        return -(-(version + (self._lead if attended else 0)) // grid) * grid

    def _follow(self, seen: Versioned, plan: Plan, cut: Cut) -> None:
        if cut.barrier != self._barrier:
            self._barrier, self._reached = cut.barrier, -1
            self._deadline_s = time.monotonic() + self._patience_s
        barrier = self._coordination.read_barrier(cut.barrier, watch=True)
        missed = barrier is not None and barrier.state is BarrierState.ABORTED  # by a server: it was told too late
        if barrier is not None and barrier.state is BarrierState.OPEN:
            given_up = (
                cut.asked and self._coordination.read_checkpoint_request(cut.name) is None
            ) or self._stands_still(plan)
            barrier = self._coordination.settle_barrier(cut.barrier, expired=given_up)
        if barrier is not None and barrier.state is BarrierState.OPEN:
            return
        done = None
        if barrier is not None and barrier.state is BarrierState.DONE:
            failpoint("checkpoint.done")
            done = self._complete(plan, cut, max(json.loads(text)["version"] for text in barrier.brought.values()))
        if done is None:
            why = barrier.reason if barrier is not None else "its barrier is gone"
            self._abort(cut, why or "nobody waits for it any more", missed=missed)
        changed = replace(plan, revision=plan.revision + 1, cut=None)
        if self._coordination.write_plan(changed.to_json(), seen.version) is not None and done is not None:
            failpoint("checkpoint.written")
            self._coordination.withdraw_checkpoint_request(cut.name)
            self._export(cut.name)
            tidy(self._store, self._job, self._layout, self._policy)

    @property
    def _patience_s(self) -> float:
        """On arrival, ranks that are past the cut wait: not for ever for one that is slow."""
        return _PATIENCE_ON_ARRIVAL_S if self._config.mode.on_arrival else _PATIENCE_S

    def _stands_still(self, plan: Plan) -> bool:
        """Whether the time is over, and nothing has moved in it."""
        if time.monotonic() < self._deadline_s:
            return False
        if self._config.mode.on_arrival:
            return True
        self._deadline_s = time.monotonic() + self._patience_s
        before = self._reached
        try:
            self._reached = self._version(plan)
        except Disconnected as error:
            self._log.info("whether training moves is not known", why=str(error))
            return False
        return before == self._reached

    def _complete(self, plan: Plan, cut: Cut, version: int) -> catalog.Checkpoint | None:
        """Make it a checkpoint; None if that cannot be any more."""
        if cut.asked and self._coordination.read_checkpoint_request(cut.name) is None:
            return None
        try:
            done = catalog.complete(
                self._store,
                self._config,
                self._layout,
                cut.name,
                version,
                term=plan.term,
                reason=Reason.ASKED if cut.asked else Reason.INTERVAL,
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
        self._lead, self._rest_s = max(_LEAD, self._lead // 2), _REST_S
        self._next_is_due()
        return done

    def _abort(self, cut: Cut, why: str, *, missed: bool) -> None:
        """Leave nothing, and try again: from further ahead if a server was told too late, else after a rest."""
        self._log.warning("checkpoint aborted, to be tried again", checkpoint=cut.name, why=why)
        catalog.remove(self._store, self._job, self._layout, [cut.name])
        if missed:
            self._lead = min(2 * self._lead, _LEAD_MAX)
        else:
            self._rest()

    def _refuse(self, name: str, why: str) -> None:
        self._coordination.answer_checkpoint_request(name, CheckpointRequest(failed=why).to_json())

    def _next_is_due(self) -> None:
        self._due_at_s = None if self._policy.every_s is None else time.time() + self._policy.every_s


def tidy(store: RedisStore, job: str, layout: Layout, policy: Policy) -> None:
    """Remove automatic checkpoints that are not to be kept, and what attempts that were cut off have left."""
    stored = catalog.read_job(store, job)
    gone = catalog.superfluous(stored.checkpoints.values(), keep=policy.keep, older_than_s=policy.older_than_s)
    catalog.remove(store, job, layout, gone)
    catalog.sweep(store, job, layout)


def checkpoint_at_end(
    config: JobConfig, layout: Layout, store: RedisStore, coordination: Coordination, policy: Policy
) -> None:
    """The last server that leaves a job keeps what it leaves, be it that the job ended or that SIGTERM announced it.

    What it leaves is durable without it; so that there is no checkpoint is told, and is no failure.
    """
    try:
        _checkpoint_at_end(config, layout, store, coordination, policy)
    except PsaError as error:
        logs.get_logger().error("no checkpoint at the end", why=str(error))


def _checkpoint_at_end(
    config: JobConfig, layout: Layout, store: RedisStore, coordination: Coordination, policy: Policy
) -> None:
    seen = coordination.read_plan()
    if seen is None or plan_from_json(seen.text).owners or coordination.hold(_END, "the last server") is not None:
        return  # others go on, somebody has begun again, or another one that has left does it
    stored = catalog.read_job(store, config.name)
    newest = stored.versions()[-1:]
    if any([each.version] == newest for each in stored.checkpoints.values()):
        return
    done = catalog.save_at_rest(store, config.name, None, Reason.END)
    log = logs.get_logger()
    log.info("checkpoint", name=done.name, version=done.version)
    tidy(store, config.name, layout, policy)
    if policy.files is not None:
        archive = Archive(policy.files, config.name)
        export = archive.write(store, done.name)
        archive.prune(policy.keep, policy.older_than_s)
        log.info("checkpoint in files", checkpoint=done.name, version=export.version, folder=export.url)
