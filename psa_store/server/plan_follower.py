"""What a server does besides serving: be a member, follow the plan, and let its controller govern if it is elected.

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
from dataclasses import replace

from psa_store import logs
from psa_store.cluster import JobShape, Member, Plan, ProcessRole, Server
from psa_store.consistency.instructions import Frozen, Missed, Pinned, Stopped
from psa_store.coordination import Coordination, known_plan
from psa_store.errors import DependencyUnreachable, Disconnected
from psa_store.job.document import Damaged
from psa_store.logs import Waits
from psa_store.server.controller import Controller
from psa_store.server.event_loop import EventLoop
from psa_store.server.messages import (
    CannotServe,
    Join,
    PeerGone,
    Release,
    Released,
    Revise,
    Serve,
    ToPlanFollower,
)
from psa_store.server.shard_loading import NotLoaded, ShardLoader
from psa_store.testing.failpoints import failpoint
from psa_store.wire import Door, Role, SharedMemory, connect

_LOOK_AGAIN_S = 1.0
_RETRY_S = 0.1
_PEER_TIMEOUT_S = 2.0


class PlanFollower:
    """Owned by one thread; any thread may :meth:`report`.

    Args:
        memory_bytes: of memory in which all parameters of the job can be published.
        woken: is set when there is something new (ZooKeeper's watches, reports, a signal).
        leaving: whether this server was told to leave: then what it owns is handed over and :meth:`run` returns.
    """

    def __init__(
        self,
        *,
        member: Member,
        shape: JobShape,
        coordination: Coordination,
        loader: ShardLoader,
        controller: Controller,
        memory_bytes: int,
        woken: threading.Event,
        leaving: Callable[[], bool],
        leave_timeout_s: float,
        door: Door,
        waits: Waits,
    ) -> None:
        self._member = member
        self._shape = shape
        self._coordination = coordination
        self._loader = loader
        self._controller = controller
        self._memory_bytes = memory_bytes
        self._woken = woken
        self._asked_to_leave = leaving
        self._leave_timeout_s = leave_timeout_s
        self._door = door
        self._waits = waits
        self._log = logs.get_logger()
        self._reports: deque[ToPlanFollower] = deque()
        self._released: queue.SimpleQueue[Released] = queue.SimpleQueue()
        self._leaving = False
        self._session: int | None = None
        """The session of ZooKeeper in which this server is a member."""
        self._plan: Plan | None = None

    @property
    def member(self) -> str:
        """The present id of this server."""
        return self._member.id

    def report(self, report: ToPlanFollower) -> None:
        """Tell something; it is looked at in the next turn."""
        if isinstance(report, Released):
            self._released.put(report)
        else:
            self._reports.append(report)
            self._woken.set()

    def close(self) -> None:
        """Finish what is being written to files. After :meth:`run`."""
        self._controller.close()

    # --- the loop

    def run(self, event_loop: EventLoop) -> None:
        """Serve until told to leave.

        Raises:
            DataIntegrity: the job's stored state cannot be served.
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
                self._waits.on("plan", "Redis and ZooKeeper, to follow the plan", str(error), say_after_s=0.0)
                self._woken.wait(_RETRY_S)
            except Disconnected as error:
                self._log.info("the place in ZooKeeper is gone", why=str(error))
            else:
                self._waits.over("plan")
                self._woken.wait(_LOOK_AGAIN_S)
        if event_loop.failure is not None:
            raise event_loop.failure

    def _turn(self, event_loop: EventLoop) -> bool:
        """Look at everything once; False when this server has left."""
        self._woken.clear()
        self._leaving = self._asked_to_leave()
        self._keep_membership()
        for _ in range(len(self._reports)):
            self._note(event_loop, self._reports[0])
            self._reports.popleft()  # not before: what could not be told to ZooKeeper is told again
        self._announce()
        seen = self._coordination.read_plan(self._shape, watch=True)
        # What can not be read is written again by the controller; until then the newest known plan holds.
        plan = self._plan if isinstance(seen, Damaged) else known_plan(seen)
        if plan is not None and plan != self._plan:
            self._follow(event_loop, plan)
        self._controller.turn(self._member.id, seen)
        return not (self._leaving and (plan is None or not plan.shards_of(self._member.id)))

    def _keep_membership(self) -> None:
        """Join, and join again under a new name after the session expired: names are never reused."""
        session = self._coordination.session_generation()
        if session != self._session:
            self._join(session, "the ZooKeeper session expired: joining again")

    def _join(self, session: int, why: str) -> None:
        if self._session is not None:
            name = f"{self._member.id.split('+')[0]}+{secrets.token_hex(3)}"
            # What it had said was about plans that ZooKeeper may have lost: a new one may have their revision.
            self._member = Member(name, self._member.host, self._member.pid, self._member.address, self._member.local)
            self._log.warning(why, member=name)
        self._coordination.join(ProcessRole.SERVER, self._member)
        self._session = session

    def _announce(self) -> None:
        """Say how this server stands, and say it again if another process has written or deleted it."""
        self._member = replace(self._member, leaving=self._leaving)
        try:
            self._coordination.update(ProcessRole.SERVER, self._member)
        except Disconnected:
            self._join(self._coordination.session_generation(), "another process deleted our znode: joining again")
        self._coordination.campaign(self._member.id)

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
            case PeerGone():
                self._waits.over(_place(report.server))
            case _:
                pass  # about a term that is over

    def _rejoin(self, event_loop: EventLoop, server: Server) -> None:
        try:
            event_loop.post(Join(server.id, self._reach(server)))
            self._waits.over(_place(server.id))
        except Disconnected as error:
            assert self._plan is not None
            self._say_unreached(server, error)
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
        history = self._loader.history()
        held = self._release(event_loop, plan.term)
        mine = plan.shards_of(self._member.id)
        memory = SharedMemory.create(self._member.id, self._memory_bytes)
        try:
            owned_shards = self._loader.load(plan, mine, held, memory, history)
        except NotLoaded as error:
            self._ask_for_take_over(plan.term, str(error))
            self._announce()
        else:
            failpoint("serve.loaded")
            peers = self._reach_others(plan) if mine else {}
            event_loop.post(Serve(self._member.id, plan, owned_shards, memory, history, peers))
        self._plan = plan

    def _reach_others(self, plan: Plan) -> dict[str, socket.socket]:
        """Connect to the other servers of the plan; those that do not answer are tried again later."""
        peers = {}
        for server in plan.servers:
            if server.id == self._member.id:
                continue
            try:
                peers[server.id] = self._reach(server)
            except Disconnected as error:
                self._say_unreached(server, error)
                self.report(PeerGone(plan.term, server.id))
        return peers

    def _say_unreached(self, server: Server, error: Disconnected) -> None:
        what = f"server {server.id} at {server.address} to be reached"
        self._waits.on(_place(server.id), what, str(error), say_after_s=0.0)

    def _release(self, event_loop: EventLoop, term: int) -> Released:
        """Make the event loop let go of the old term; returns what it held."""
        event_loop.post(Release(term))
        while event_loop.alive:
            try:
                released = self._released.get(timeout=_LOOK_AGAIN_S)
            except queue.Empty:
                self._waits.on("release", f"the event loop to let go of what is before term {term}")
                continue
            self._waits.over("release")
            return released
        return Released(None, {})

    def _reach(self, server: Server) -> socket.socket:
        return connect(server.address, server.local, server.host, _PEER_TIMEOUT_S, self._door, Role.SERVER)


def _place(server: str) -> str:
    """Where the wait for another server is noted."""
    return f"server {server}"
