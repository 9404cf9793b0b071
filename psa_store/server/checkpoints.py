"""Checkpoints while training goes on: run by the controller, one at a time.

    asked for, or due ──▶ barrier opened, cut in the plan ──▶ all servers have committed and pinned it ──▶ document
          ▲                        │ a member is gone, too late, a new epoch, time is over
          └────────────────────────┘ pins removed, tried again

The plan carries the cut, so that a controller that dies is followed by one that goes on from there; what it was asked
for lies in ZooKeeper until it is done. In a synchronous job the cut is a version some steps ahead, which every server
commits when it comes there; a server that is past it says so, and the next cut lies twice as far ahead. On arrival,
workers mark it (see ``consistency.arrival``).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

from psa_store import telemetry
from psa_store.checkpoint import catalog
from psa_store.checkpoint.archive import Archive
from psa_store.checkpoint.catalog import Reason
from psa_store.coordination import BarrierState, Coordination, Versioned
from psa_store.errors import DataIntegrity, Disconnected, PsaError, Rewound
from psa_store.failpoints import failpoint
from psa_store.job import JobConfig
from psa_store.layout import Layout
from psa_store.monitor import EventKind, Events
from psa_store.plan import NOBODY, Cut, Phase, Plan, plan_from_json
from psa_store.server.exporting import Exporter
from psa_store.storage import RedisStore
from psa_store.telemetry import Vitals
from psa_store.wire import inspect

_DEADLINE_S = 900.0
"""How long an attempt may take: a step, and a commit that takes its time. Who dies meanwhile ends it at once."""
_INSPECT_S = 1.0
_LEAD = 2
_LEAD_MAX = 1 << 14
_PAUSE_S = 5.0
"""Between a failed automatic checkpoint and the next attempt."""


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
        vitals: Vitals,
        events: Events,
    ) -> None:
        self._vitals = vitals
        self._events = events
        self._config = config
        self._job = config.name
        self._layout = layout
        self._store = store
        self._coordination = coordination
        self._policy = policy
        self._log = telemetry.get_logger()
        self._lead = _LEAD
        self._barrier = ""
        self._deadline_s = 0.0
        self._due_at_s: float | None = None
        """By the clock of the wall, since others may have taken the last one; None: not known yet."""
        self._exporter: Exporter | None = None

    def close(self) -> None:
        """Finish what is being written to files."""
        if self._exporter is not None:
            self._exporter.close()

    def turn(self, seen: Versioned, plan: Plan) -> None:
        """Do what can be done now. One action a turn, as with the plan itself."""
        if plan.cut is not None:
            self._follow(seen, plan, plan.cut)
        elif plan.phase is Phase.RUN and (wanted := self._wanted()) is not None:
            self._begin(seen, plan, *wanted)

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

    def _wanted(self) -> tuple[str, Reason] | None:
        for name in self._coordination.wishes(watch=True):
            wish = self._coordination.read_wish(name)
            if wish is not None and "failed" not in json.loads(wish.text):
                return name, Reason.ASKED
        if self._policy.every_s is None:
            return None
        if self._due_at_s is None:
            taken = catalog.read_job(self._store, self._job).checkpoints.values()
            newest = max(taken, key=lambda each: each.created_s, default=None)
            self._due_at_s = (time.time() if newest is None else newest.created_s) + self._policy.every_s
            if newest is not None:
                self._export(newest.name)  # the controller before us may have died before it had
        if time.time() < self._due_at_s:
            return None
        return catalog.automatic_name(self._store.read_checkpoints(self._job), time.time()), Reason.INTERVAL

    # --- an attempt

    def _begin(self, seen: Versioned, plan: Plan, name: str, reason: Reason) -> None:
        attended = any(holder != NOBODY for holder in plan.ranks)
        if self._config.mode.on_arrival and not attended:
            self._fail(name, reason, "no worker holds a rank, who would have to mark it. Stop the servers, and repeat")
            return
        version = -1
        if not self._config.mode.on_arrival:
            try:
                version = self._version_ahead(plan, self._lead if attended else 0, reason)
            except Disconnected as error:
                self._log.info("no checkpoint yet", why=str(error))
                return
        barrier = self._coordination.open_barrier(plan.epoch, [server.id for server in plan.servers])
        failpoint("checkpoint.opened")
        cut = Cut(name, barrier, version)
        changed = replace(plan, revision=plan.revision + 1, cut=cut)
        if self._coordination.write_plan(changed.to_json(), seen.version) is not None:
            self._log.info("taking a checkpoint", checkpoint=name, version=version if version >= 0 else "as marked")

    def _version_ahead(self, plan: Plan, lead: int, reason: Reason) -> int:
        """A version that no server has reached, if ``lead`` is enough; raises Disconnected if none tells where it is.

        One that nobody waits for takes the next regular commit, so that it costs nothing at all.
        """
        server = plan.servers[0]
        report = inspect(server.address, server.local, server.host, _INSPECT_S)
        if report["version"] is None or report["epoch"] != plan.epoch:
            raise Disconnected(f"server {server.id} does not serve epoch {plan.epoch} yet")
        interval = self._config.commit_interval
        grid = interval if interval and (self._config.ranks_stay or reason is Reason.INTERVAL) else 1
        return -(-(int(report["version"]) + lead) // grid) * grid

    def _follow(self, seen: Versioned, plan: Plan, cut: Cut) -> None:
        if cut.barrier != self._barrier:
            self._barrier, self._deadline_s = cut.barrier, time.monotonic() + _DEADLINE_S
        barrier = self._coordination.read_barrier(cut.barrier, watch=True)
        if barrier is not None and barrier.state is BarrierState.OPEN:
            expired = time.monotonic() > self._deadline_s
            barrier = self._coordination.settle_barrier(cut.barrier, expired=expired)
        if barrier is None or barrier.state is BarrierState.ABORTED:
            self._abort(plan, cut, barrier.reason if barrier is not None else "its barrier is gone")
        elif barrier.state is BarrierState.DONE:
            failpoint("checkpoint.done")
            self._complete(plan, cut, max(json.loads(text)["version"] for text in barrier.brought.values()))
        else:
            return
        changed = replace(plan, revision=plan.revision + 1, cut=None)
        self._coordination.write_plan(changed.to_json(), seen.version)

    def _complete(self, plan: Plan, cut: Cut, version: int) -> None:
        wish = self._coordination.read_wish(cut.name)
        reason = Reason.INTERVAL if wish is None else Reason.ASKED
        named = wish is not None and bool(json.loads(wish.text).get("named"))
        try:
            done = catalog.complete(
                self._store,
                self._config,
                self._layout,
                cut.name,
                version,
                epoch=plan.epoch,
                reason=reason,
                named=named,
            )
        except (DataIntegrity, Rewound) as error:
            self._abort(plan, cut, str(error))
            return
        failpoint("checkpoint.written")
        self._coordination.withdraw_wish(cut.name)
        self._log.info("checkpoint", name=done.name, version=done.version, megabytes=round(done.bytes / 1e6, 1))
        self._vitals.add("checkpoints")
        self._vitals.set("checkpoint_time_seconds", done.created_s)
        text = f"checkpoint {done.name} of version {done.version}"
        self._events.note(EventKind.CHECKPOINT, text, epoch=plan.epoch, version=version)
        self._next_is_due()
        self._export(cut.name)
        tidy(self._store, self._job, self._layout, self._policy)

    def _abort(self, plan: Plan, cut: Cut, why: str) -> None:
        """Leave nothing, and try again: from further ahead, since being too late is what cannot be seen here."""
        self._log.warning("checkpoint aborted, to be tried again", checkpoint=cut.name, why=why)
        self._vitals.add("checkpoint_failures")
        self._store.unpin(self._job, [shard.index for shard in self._layout.versioned], [cut.name])
        self._lead = min(2 * self._lead, _LEAD_MAX)
        if self._coordination.read_wish(cut.name) is None and self._due_at_s is not None:
            self._due_at_s = time.time() + _PAUSE_S

    def _fail(self, name: str, reason: Reason, why: str) -> None:
        if reason is Reason.ASKED:
            self._coordination.answer_wish(name, json.dumps({"failed": why}))
        else:
            self._due_at_s = time.time() + _PAUSE_S

    def _next_is_due(self) -> None:
        self._due_at_s = None if self._policy.every_s is None else time.time() + self._policy.every_s


def tidy(store: RedisStore, job: str, layout: Layout, policy: Policy) -> None:
    """Remove automatic checkpoints that are not to be kept, and what attempts that were cut off have left."""
    stored = catalog.read_job(store, job)
    gone = catalog.superfluous(stored.checkpoints.values(), keep=policy.keep, older_than_s=policy.older_than_s)
    catalog.remove(store, job, layout, gone)
    catalog.sweep(store, job, layout, None)


def checkpoint_at_end(
    config: JobConfig, layout: Layout, store: RedisStore, coordination: Coordination, policy: Policy
) -> None:
    """The last server that leaves a job keeps what it leaves, be it that the job ended or that SIGTERM announced it.

    What it leaves is durable without it; so that there is no checkpoint is told, and is no failure.
    """
    try:
        _checkpoint_at_end(config, layout, store, coordination, policy)
    except PsaError as error:
        telemetry.get_logger().error("no checkpoint at the end", why=str(error))


def _checkpoint_at_end(
    config: JobConfig, layout: Layout, store: RedisStore, coordination: Coordination, policy: Policy
) -> None:
    seen = coordination.read_plan()
    if seen is None or plan_from_json(seen.text).owners:
        return  # others go on, or somebody has begun again
    stored = catalog.read_job(store, config.name)
    newest = stored.versions()[-1:]
    if any([each.version] == newest for each in stored.checkpoints.values()):
        return
    done = catalog.save_at_rest(store, config.name, None, Reason.END)
    log = telemetry.get_logger()
    log.info("checkpoint", name=done.name, version=done.version)
    tidy(store, config.name, layout, policy)
    if policy.files is not None:
        archive = Archive(policy.files, config.name)
        export = archive.write(store, done.name)
        archive.prune(policy.keep, policy.older_than_s)
        log.info("checkpoint in files", checkpoint=done.name, version=export.version, folder=export.url)
