"""The controller: the elected server that makes the plan fit the members, begins terms, and takes checkpoints.

What to do is decided by :func:`psa_store.cluster.decide`. Used by the plan follower's thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from psa_store import logs
from psa_store.cluster import Plan, ProcessRole, Publish, TakeOver, View, believed, decide
from psa_store.coordination import Coordination, StoredPlan, known_plan
from psa_store.job.config import JobConfig
from psa_store.job.document import Damaged
from psa_store.job.layout import Layout
from psa_store.observe import EventKind, Events
from psa_store.observe.metrics import Metrics
from psa_store.server.aggregator import rules_of
from psa_store.server.checkpoints import Checkpoints
from psa_store.server.takeover import take_over
from psa_store.storage import RedisStore
from psa_store.testing.journal import Journal


class Controller:
    """Every server has one; :meth:`turn` does something only where it is elected."""

    def __init__(
        self,
        *,
        config: JobConfig,
        layout: Layout,
        store: RedisStore,
        coordination: Coordination,
        checkpoints: Checkpoints,
        journal: Journal,
        metrics: Metrics,
        events: Events,
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._rules = rules_of(config)
        self._layout = layout
        self._store = store
        self._coordination = coordination
        self._checkpoints = checkpoints
        self._journal = journal
        self._metrics = metrics
        self._events = events
        self._wake = wake
        self._log = logs.get_logger()
        self._elected = False
        self._last: Plan | None = None
        """The newest plan that could be read."""

    def close(self) -> None:
        """Finish what is being written to files."""
        self._checkpoints.close()

    def turn(self, member: str, seen: StoredPlan | Damaged | None) -> None:
        """Do one thing, if this server (``member``) is elected; the plan's watch brings the next."""
        elected = self._coordination.is_elected(member)
        if elected and not self._elected:
            self._log.info("elected controller", member=member)
            self._journal.record("elected", member=member)
        self._elected = elected
        self._metrics.set("controller", float(elected))
        self._metrics.set("set_aside", self._coordination.set_aside + self._store.account.count)
        self._last = known_plan(seen) or self._last
        if not elected:
            self._events.resign()
        elif self._govern(seen):
            self._wake()
        else:
            self._mend()
            if isinstance(seen, StoredPlan) and seen.plan.owners:
                self._checkpoints.turn(seen)
        for damaged in (*self._coordination.damage(), *self._store.account.news()):
            if elected:
                self._events.note(EventKind.SET_ASIDE, f"{damaged.where} can not be read: {damaged.why}")

    def _mend(self) -> None:
        """Write again what is read too seldom for its damage to be met elsewhere."""
        if self._last is not None:
            self._coordination.mend_term(self._last.term)
        if not isinstance(self._coordination.read_config(watch=True), JobConfig):
            self._coordination.replace_config(self._config)  # with the next term, its newer changes as well

    def _govern(self, seen: StoredPlan | Damaged | None) -> bool:
        """Make the plan fit the members; whether there was something to do."""
        plan = known_plan(seen)
        servers, workers = (self._coordination.members(role, watch=True) for role in ProcessRole)
        view = View(
            plan=plan,
            servers=believed(servers, self._last),
            workers=believed(workers, self._last),
            shard_sizes=tuple(shard.size_bytes for shard in self._layout.shards),
            ranks=self._config.ranks,
            stages=self._config.stages,
            stop_interval=self._config.commit_interval if self._config.ranks_stay else 0,
            on_arrival=self._rules.on_arrival,
            damage=seen if isinstance(seen, Damaged) else None,
            last=self._last,
            version=self._version(plan),
        )
        self._events.see(view)
        action = decide(view)
        match action:
            case TakeOver():
                self._take_over(action, seen)
            case Publish():
                self._log.info("new plan", why=action.reason, phase=action.plan.phase.value)
                if self._coordination.write_plan(action.plan, seen) is not None:
                    self._events.planned(plan, action.plan, action.reason)
            case None:
                return False
        return True

    def _version(self, plan: Plan | None) -> int:
        """The newest version that is known of a plan's term; a server without shards knows only where it began."""
        known = self._metrics.read()
        if plan is None or known.get("term") != plan.term:
            return 0 if plan is None else plan.resume
        return int(known.get("version", plan.resume))

    def _take_over(self, action: TakeOver, seen: StoredPlan | Damaged | None) -> None:
        before = self._last
        begun_s, reached = time.monotonic(), int(self._metrics.read().get("version", 0))
        begun = take_over(
            action,
            seen,
            job=self._config.name,
            layout=self._layout,
            coordination=self._coordination,
            store=self._store,
            journal=self._journal,
        )
        if begun is not None:
            took_s = time.monotonic() - begun_s
            self._metrics.add("take_overs")
            self._metrics.set("take_over_seconds", took_s)
            self._events.took_over(action, before, begun, took_s, reached)
