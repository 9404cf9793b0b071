"""The controller: the elected server that makes the plan fit the members, begins terms, and takes checkpoints.

What to do is decided by :func:`psa_store.cluster.decide`. Used by the plan follower's thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from psa_store import logs
from psa_store.cluster import ProcessRole, Publish, TakeOver, View, decide
from psa_store.coordination import Coordination, StoredPlan
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout
from psa_store.observe import Events
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

    def close(self) -> None:
        """Finish what is being written to files."""
        self._checkpoints.close()

    def turn(self, member: str, seen: StoredPlan | None) -> None:
        """Do one thing, if this server (``member``) is elected; the plan's watch brings the next."""
        elected = self._coordination.is_elected(member)
        if elected and not self._elected:
            self._log.info("elected controller", member=member)
            self._journal.record("elected", member=member)
        self._elected = elected
        self._metrics.set("controller", float(elected))
        if not elected:
            self._events.resign()
        elif self._govern(seen):
            self._wake()
        elif seen is not None and seen.plan.owners:
            self._checkpoints.turn(seen)

    def _govern(self, seen: StoredPlan | None) -> bool:
        """Make the plan fit the members; whether there was something to do."""
        plan = seen.plan if seen else None
        view = View(
            plan=plan,
            servers=self._coordination.members(ProcessRole.SERVER, watch=True),
            workers=self._coordination.members(ProcessRole.WORKER, watch=True),
            shard_sizes=tuple(shard.size_bytes for shard in self._layout.shards),
            ranks=self._config.ranks,
            stages=self._config.stages,
            stop_interval=self._config.commit_interval if self._config.ranks_stay else 0,
            on_arrival=self._rules.on_arrival,
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

    def _take_over(self, action: TakeOver, seen: StoredPlan | None) -> None:
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
            self._events.took_over(action, seen.plan if seen else None, begun, took_s, reached)
