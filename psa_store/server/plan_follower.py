"""What a server does besides serving: be a member, follow the plan, and govern when it is elected controller.

One thread (the caller of :meth:`PlanFollower.run`) makes all calls to ZooKeeper and the slow ones to Redis. It never
acts inside a watch: everything that happens sets one event, and each turn looks at the whole situation afresh.
"""

from __future__ import annotations

import math
import queue
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from psa_store import logs
from psa_store.checkpoint.policy import CheckpointPolicy
from psa_store.cluster import (
    Member,
    Plan,
    ProcessRole,
    Publish,
    Server,
    TakeOver,
    View,
    decide,
    newest_common,
)
from psa_store.compression import NONE
from psa_store.coordination import Coordination, StoredPlan
from psa_store.errors import DataIntegrity, DependencyUnreachable, Disconnected, Fenced, Rewound
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.job.wire_layout import WireLayout
from psa_store.observe import Events
from psa_store.observe.metrics import Metrics
from psa_store.optim import Optimizer
from psa_store.server.checkpoints import Checkpoints
from psa_store.server.event_loop import EventLoop
from psa_store.server.messages import (
    CannotServe,
    Frozen,
    Join,
    Missed,
    PeerGone,
    Pinned,
    Release,
    Released,
    Revise,
    Serve,
    Stopped,
    ToPlanFollower,
)
from psa_store.server.shard import OwnedShard
from psa_store.server.takeover import take_over
from psa_store.storage import Head, RedisStore
from psa_store.testing.failpoints import failpoint
from psa_store.testing.journal import Journal
from psa_store.wire import SharedMemory, connect

_LOOK_AGAIN_S = 1.0
_RETRY_S = 0.1
_LOADERS = 4
_PEER_TIMEOUT_S = 2.0


class PlanFollower:
    """Owned by one thread; any thread may :meth:`report`.

    ``woken`` is set by whoever has news (ZooKeeper's watches, reports, a signal). Once ``leaving()`` is true, what
    this server owns is handed over and :meth:`run` returns.
    """

    def __init__(
        self,
        *,
        member: Member,
        config: JobConfig,
        layout: Layout,
        wire: WireLayout,
        optimizer: Optimizer,
        store: RedisStore,
        coordination: Coordination,
        woken: threading.Event,
        leaving: Callable[[], bool],
        leave_timeout_s: float,
        policy: CheckpointPolicy,
        journal: Journal,
        metrics: Metrics,
        events: Events,
    ) -> None:
        self._metrics = metrics
        self._events = events
        self._member = member
        self._announced = member
        self._config = config
        self._job = config.name
        self._clocks = config.clocks
        self._layout = layout
        self._wire = wire
        self._optimizer = optimizer
        self._store = store
        self._coordination = coordination
        self._woken = woken
        self._log = logs.get_logger()
        self._reports: deque[ToPlanFollower] = deque()
        self._released: queue.SimpleQueue[Released] = queue.SimpleQueue()
        self._asked_to_leave = leaving
        self._leave_timeout_s = leave_timeout_s
        self._journal = journal
        self._checkpoints = Checkpoints(config, layout, store, coordination, policy, metrics, events)
        self._leaving = False
        self._generation = -1
        self._governs = False
        self._plan: Plan | None = None

    @property
    def member(self) -> str:
        """Our present id."""
        return self._member.id

    def report(self, report: ToPlanFollower) -> None:
        """Tell control something; it looks at it in its next turn."""
        if isinstance(report, Released):
            self._released.put(report)
        else:
            self._reports.append(report)
            self._woken.set()

    def close(self) -> None:
        """Finish what is being written to files. After :meth:`run`."""
        self._checkpoints.close()

    # --- the loop

    def run(self, event_loop: EventLoop) -> None:
        """Serve until told to leave.

        Raises:
            DataIntegrity: the job's stored state cannot be served by anyone.
            DependencyUnreachable: told to leave, but nothing could be handed over in ``leave_timeout_s``.
        """
        leave_by_s = math.inf
        while event_loop.alive:
            if self._asked_to_leave():
                leave_by_s = min(leave_by_s, time.monotonic() + self._leave_timeout_s)
            if time.monotonic() > leave_by_s:
                raise DependencyUnreachable(
                    f"leaving without a hand-over, which did not succeed in {self._leave_timeout_s:g} s: "
                    "the job goes back to its last commit"
                )
            try:
                if not self._turn(event_loop):
                    return
            except DependencyUnreachable as error:
                self._log.warning("waiting for a dependency", error=str(error))
                self._woken.wait(_RETRY_S)
            except Disconnected as error:
                self._log.info("our place in ZooKeeper is gone", why=str(error))
            else:
                self._woken.wait(_LOOK_AGAIN_S)
        if event_loop.failure is not None:
            raise event_loop.failure

    def _turn(self, event_loop: EventLoop) -> bool:
        """Look at everything once; False when we have left."""
        self._woken.clear()
        self._leaving = self._asked_to_leave()
        self._keep_membership()
        for _ in range(len(self._reports)):
            self._note(event_loop, self._reports[0])
            self._reports.popleft()  # not before: what could not be told to ZooKeeper is told again
        self._announce()
        seen = self._coordination.read_plan(watch=True)
        plan = seen.plan if seen else None
        if plan is not None and plan != self._plan:
            self._follow(event_loop, plan)
        elected = self._coordination.is_elected(self._member.id)
        if elected and not self._governs:
            self._log.info("elected controller", member=self._member.id)
            self._journal.record("elected", member=self._member.id)
        self._governs = elected
        self._metrics.set("controller", float(elected))
        if not elected:
            self._events.resign()
        elif not self._govern(seen) and seen is not None and seen.plan.owners:
            self._checkpoints.turn(seen)
        return not (self._leaving and (plan is None or not plan.shards_of(self._member.id)))

    def _keep_membership(self) -> None:
        """Join, and join again under a new name after our session expired: names are never reused."""
        generation = self._coordination.session_generation()
        if generation == self._generation:
            return
        if self._generation >= 0:
            self._member = replace(
                self._member, id=f"{self._member.id.split('+')[0]}+{secrets.token_hex(3)}", reload_term=None
            )
            self._log.warning("the ZooKeeper session expired: joining again", member=self._member.id)
        self._coordination.join(ProcessRole.SERVER, self._member)
        self._announced = self._member
        self._coordination.campaign(self._member.id)
        self._generation = generation

    def _announce(self) -> None:
        self._member = replace(self._member, leaving=self._leaving)
        if self._member != self._announced:
            self._coordination.update(ProcessRole.SERVER, self._member)
            self._announced = self._member

    def _note(self, event_loop: EventLoop, report: ToPlanFollower) -> None:
        match report:
            case Frozen():
                failpoint("handover.frozen")
                self._member = replace(
                    self._member,
                    frozen_revision=report.revision,
                    frozen_newest=report.newest,
                    frozen_version=report.version,
                )
            case Stopped():
                failpoint("handover.stopped")
                self._member = replace(self._member, stopped_version=report.version)
            case CannotServe():
                self._ask_for_take_over(report.term, report.why)
            case Pinned() if self._plan is not None and report.term == self._plan.term:
                self._coordination.arrive(report.cut.barrier, self._member.id, report.version)
            case Missed() if self._plan is not None and report.term == self._plan.term:
                self._coordination.settle_barrier(report.cut.barrier, expired=True)
            case PeerGone() if self._plan is not None and report.term == self._plan.term:
                for server in self._plan.servers:
                    if server.id == report.server:
                        self._rejoin(event_loop, server)
            case _:
                pass  # about a term that is over

    def _rejoin(self, event_loop: EventLoop, server: Server) -> None:
        try:
            event_loop.post(Join(server.id, self._reach(server)))
        except Disconnected:
            assert self._plan is not None
            self._reports.append(PeerGone(self._plan.term, server.id))  # until a plan without it comes

    def _ask_for_take_over(self, term: int, why: str) -> None:
        self._log.warning("asking for a take-over", term=term, why=why)
        self._member = replace(self._member, reload_term=term)

    # --- following the plan

    def _follow(self, event_loop: EventLoop, plan: Plan) -> None:
        if self._plan is not None and plan.term == self._plan.term:
            event_loop.post(Revise(plan))
            self._plan = plan
            return
        held = self._release(event_loop, plan.term)
        mine = plan.shards_of(self._member.id)
        memory = SharedMemory.create(self._member.id, self._layout.arena_bytes)
        owned_shards = self._load(plan, mine, held, memory)
        if owned_shards is None:
            self._announce()
            self._plan = plan
            return
        failpoint("serve.loaded")
        others = [server for server in plan.servers if server.id != self._member.id] if mine else []
        peers = {}
        for server in others:
            try:
                peers[server.id] = self._reach(server)
            except Disconnected as error:
                self._log.info("a peer cannot be reached yet", peer=server.id, why=str(error))
                self.report(PeerGone(plan.term, server.id))
        event_loop.post(Serve(self._member.id, plan, owned_shards, memory, peers))
        self._plan = plan

    def _release(self, event_loop: EventLoop, term: int) -> Released:
        """Make the event loop let go of the old term; returns what it held."""
        event_loop.post(Release(term))
        while event_loop.alive:
            try:
                return self._released.get(timeout=_LOOK_AGAIN_S)
            except queue.Empty:
                continue
        return Released(-1, {})

    def _reach(self, server: Server) -> socket.socket:
        return connect(server.address, server.local, server.host, _PEER_TIMEOUT_S)

    def _load(
        self, plan: Plan, mine: tuple[int, ...], held: Released, memory: SharedMemory
    ) -> dict[int, OwnedShard] | None:
        """Read the shards at the version where the term begins; None if that needs another term first."""
        heads = {head.shard: head for head in self._store.heads(self._job, mine)}
        wanted = {i: 0 if self._layout.shards[i].role is TensorRole.FROZEN else plan.resume for i in mine}
        if any(head.term != plan.term or head.manifest(wanted[i]) is None for i, head in heads.items()):
            self._ask_for_take_over(plan.term, "the shards in Redis are not as the plan left them")
            return None
        with ThreadPoolExecutor(_LOADERS, thread_name_prefix="psa-load") as loaders:
            owned_shards = dict(
                zip(
                    mine,
                    loaders.map(lambda i: self._load_one(heads[i], wanted[i], plan, held, memory), mine),
                    strict=True,
                )
            )
        whole = {index: owned for index, owned in owned_shards.items() if owned is not None}
        return whole if len(whole) == len(mine) else None

    def _load_one(
        self, head: Head, version: int, plan: Plan, held: Released, memory: SharedMemory
    ) -> OwnedShard | None:
        """Read one shard; None if it is damaged and was put aside for an older version.

        Raises:
            DataIntegrity: it is damaged and nothing older can replace it. Nothing was changed.
        """
        shard = self._layout.shards[head.shard]
        manifest = head.manifest(version)
        assert manifest is not None
        kept = held.owned_shards.get(head.shard)
        if kept is not None and kept.committed == manifest and held.version in (plan.resume, 0):
            kept.drop_pushes()
            kept.move_to(memory)  # not in place: workers may still be reading the old term's
            return kept  # a hand-over: we stand where the term begins, with what Redis holds
        config = self._config
        owned = OwnedShard(
            shard,
            self._layout,
            self._wire,
            self._optimizer,
            memory,
            self._clocks,
            movements=config.compression if config.publishes_movements else NONE,
            seed=config.seed,
        )
        try:
            self._store.load(self._job, head.shard, manifest, owned.places(manifest))
        except DataIntegrity as error:
            if shard.role is TensorRole.FROZEN or not self._older_version_exists(plan):
                raise
            self._log.error("a damaged version is put aside", version=version, why=str(error))
            try:
                self._store.mark_corrupt(self._job, head.shard, plan.term, version)
            except (Fenced, Rewound) as late:
                self._log.info("overtaken while loading", term=plan.term, why=str(late))
                return None  # a newer plan is coming
            self._journal.record("marked_corrupt", term=plan.term, shard=head.shard, version=version)
            self._ask_for_take_over(plan.term, str(error))
            return None
        owned.loaded(manifest)
        return owned

    def _older_version_exists(self, plan: Plan) -> bool:
        """Whether all shards share a version other than the one at which this term began."""
        heads = self._store.heads(self._job, [shard.index for shard in self._layout.versioned])
        versions = {head.shard: {m.version for m in head.manifests} - {plan.resume} for head in heads}
        return newest_common(versions) is not None

    # --- governing

    def _govern(self, seen: StoredPlan | None) -> bool:
        """Controller only: make the plan fit the members; whether there was something to do.

        One action a turn; the plan's watch brings the next.
        """
        plan = seen.plan if seen else None
        view = View(
            plan=plan,
            servers=self._coordination.members(ProcessRole.SERVER, watch=True),
            workers=self._coordination.members(ProcessRole.WORKER, watch=True),
            shard_sizes=tuple(shard.size_bytes for shard in self._layout.shards),
            ranks=self._config.ranks,
            stop_interval=self._config.commit_interval if self._config.ranks_stay else 0,
            on_arrival=self._config.mode.on_arrival,
        )
        self._events.see(view)
        begun_s, reached = time.monotonic(), int(self._metrics.read().get("version", 0))
        action = decide(view)
        match action:
            case TakeOver():
                begun = take_over(
                    action,
                    seen,
                    job=self._job,
                    layout=self._layout,
                    coordination=self._coordination,
                    store=self._store,
                    journal=self._journal,
                )
                if begun is not None:
                    self._metrics.add("take_overs")
                    self._metrics.set("take_over_seconds", time.monotonic() - begun_s)
                    self._events.took_over(action, plan, begun, time.monotonic() - begun_s, reached)
            case Publish():
                self._log.info("new plan", why=action.reason, phase=action.plan.phase.value)
                if self._coordination.write_plan(action.plan, seen) is not None:
                    self._events.planned(plan, action.plan, action.reason)
            case None:
                return False
        self._woken.set()
        return True
