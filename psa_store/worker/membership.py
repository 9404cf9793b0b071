"""A worker's place in ZooKeeper and the newest plan, kept by a thread so that training never waits for ZooKeeper."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace

from psa_store import logs
from psa_store.cluster import Cell, JobShape, Member, Plan, ProcessRole
from psa_store.coordination import Coordination
from psa_store.coordination.identity import new_member_id
from psa_store.errors import DependencyUnreachable, Disconnected, PsaError
from psa_store.job.document import Damaged
from psa_store.logs import Waits
from psa_store.wire import Mailbox, host_identity

_LOOK_AGAIN_S = 5.0
_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class Standing:
    """This worker's id in the job, the newest plan, and the ranks that it gives to this worker in the end."""

    member: str
    plan: Plan | None = None
    held: tuple[int, ...] = ()
    cells: tuple[Cell, ...] = ()
    """Which of the stages of those ranks: all, where there is one."""
    cells_before: tuple[Cell, ...] = ()
    """Those before some of them move, where the plan says that they will."""
    failure: PsaError | None = None
    """What made it impossible to know a newer plan: one that cannot be read."""

    def cells_at(self, step: int) -> tuple[Cell, ...]:
        """Those that this worker computes in a step."""
        return self.cells if self.plan is None or step >= self.plan.moved_at else self.cells_before

    def ranks_at(self, step: int) -> tuple[int, ...]:
        """The ranks of those."""
        cells = self.cells_at(step)
        return self.held if cells is self.cells else tuple(dict.fromkeys(cell.rank for cell in cells))


class Membership:
    """Owns the thread ``psa-plan``. ``standing`` is replaced as a whole, so any thread may read it.

    ``woken`` is set by ZooKeeper's watches; every change of the standing is posted to ``mailbox``.
    """

    def __init__(
        self,
        member: str,
        shape: JobShape,
        coordination: Coordination,
        woken: threading.Event,
        mailbox: Mailbox[None],
        waits: Waits,
    ) -> None:
        self._shape = shape
        self._coordination = coordination
        self._woken = woken
        self._mailbox = mailbox
        self._waits = waits
        self._log = logs.get_logger()
        self._generation = coordination.session_generation()
        self._closing = False
        self.standing = Standing(member)
        self._join(member)
        self._thread = threading.Thread(target=self._run, name="psa-plan")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the plan is still followed."""
        return self._thread.is_alive()

    def refresh(self) -> None:
        """There is a newer plan: read it."""
        self._woken.set()

    def close(self) -> None:
        self._closing = True
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._closing:
            try:
                standing = self._look()
                pause_s = _LOOK_AGAIN_S
                self._waits.over("zookeeper")
            except DependencyUnreachable as error:
                self._waits.on("zookeeper", "ZooKeeper; until then the last known plan holds", str(error))
                standing, pause_s = self.standing, _RETRY_S
            except PsaError as error:
                standing = replace(self.standing, failure=error)
            if standing != self.standing:
                self.standing = standing
                self._mailbox.post(None)
            if standing.failure is not None:
                return
            if standing.plan is not None and standing.plan.owners:
                self._waits.over("plan")
            else:
                self._waits.on("plan", "a server of the job", "`psa server --job NAME` starts one")
            self._woken.wait(pause_s)
            self._woken.clear()

    def _look(self) -> Standing:
        member = self.standing.member
        generation = self._coordination.session_generation()
        if generation != self._generation or not self._is_member(member):
            # The others count this worker as dead: join under another id.
            member = new_member_id("worker")
            self._log.warning("the place in ZooKeeper is gone: joining again", member=member)
            self._join(member)
            self._generation = generation
        seen = self._coordination.read_plan(self._shape, watch=True)
        if isinstance(seen, Damaged):  # the controller writes it again
            return self.standing if member == self.standing.member else Standing(member)
        if seen is None:
            return Standing(member)
        plan = seen.plan
        before = plan.cells_of(member, 0) if plan.moved_at else ()
        return Standing(member, plan, plan.ranks_of(member), plan.cells_of(member), before)

    def _join(self, member: str) -> None:
        self._coordination.join(ProcessRole.WORKER, _said_by(member))

    def _is_member(self, member: str) -> bool:
        try:
            self._coordination.update(ProcessRole.WORKER, _said_by(member))
        except Disconnected:
            return False
        return True


def _said_by(worker: str) -> Member:
    return Member(worker, host_identity(), os.getpid())
