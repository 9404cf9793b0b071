"""One member of the drill, as a process: ``python -m chaos.barrier.member HOSTS JOB NAME SLOT JOURNALS``.

The elected member opens barriers, one after another, for all present members; the plan names the barrier. A member
whose session expired ends with exit code 3.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

from psa_store import cluster
from psa_store.cluster import Cut, Plan, ProcessRole
from psa_store.coordination import Barrier, BarrierState, Coordination, StoredPlan
from psa_store.errors import DependencyUnreachable
from psa_store.launch.guard import die_with_parent
from psa_store.testing.journal import Journal

MEMBERS = 3
SESSION_S = 2.0
PATIENCE_S = 3.0
"""How long a member waits at one barrier."""
CONNECT_S = 10.0
_GAP_S = 0.03
"""Members arrive one after another, so that one that passes too early is seen."""


def opened_by(plan: StoredPlan | None) -> str | None:
    """The id of the barrier that a plan names."""
    return plan.plan.cut.barrier if plan is not None and plan.plan.cut is not None else None


class Member:
    def __init__(self, hosts: str, job: str, name: str, slot: int, journals: Path) -> None:
        self._name, self._slot = name, slot
        self._news = threading.Event()
        self._door = Coordination(
            hosts, job, session_timeout_s=SESSION_S, connect_timeout_s=CONNECT_S, wake=self._news.set
        )
        self._journal = Journal(journals, "member", name)
        self._term: int | None = None
        """The term of this member while it is elected."""
        self._since: dict[str, float] = {}
        """By barrier, when it was first seen."""
        self._arrived: set[str] = set()
        self._recorded: set[str] = set()

    def close(self) -> None:
        self._door.close()
        self._journal.close()

    def run(self) -> int:
        self._door.start()
        self._door.join(ProcessRole.SERVER, cluster.Member(self._name, "", os.getpid()))
        self._door.campaign(self._name)
        while self._door.session_generation() == 0:
            self._news.clear()
            try:
                self._turn()
            except DependencyUnreachable:
                continue
            self._news.wait(PATIENCE_S)
        return 3

    def _turn(self) -> None:
        elected = self._door.is_elected(self._name)
        plan = self._door.read_plan(watch=True)
        known = opened_by(plan)
        barrier = self._door.read_barrier(known, watch=True) if known is not None else None
        if elected:
            if self._term is None:
                self._term = self._door.next_term()
            present = self._door.members(ProcessRole.SERVER, watch=True)
            if known is not None:
                barrier = self._door.settle_barrier(known)
            if barrier is None or barrier.state is not BarrierState.OPEN:
                if barrier is not None and known is not None:
                    self._record_outcome(known, barrier)
                if len(present) == MEMBERS:
                    opened = self._door.open_barrier(self._term, present)
                    self._door.write_plan(Plan(self._term, 1, 0, (), (), (), cut=Cut("drill", opened)), plan)
                return
        if known is not None and barrier is not None:
            self._meet(known, barrier)

    def _meet(self, barrier_id: str, barrier: Barrier) -> None:
        now_s = time.monotonic()
        since_s = self._since.setdefault(barrier_id, now_s)
        if barrier.state is BarrierState.OPEN and self._name in barrier.members:
            if barrier_id not in self._arrived:
                threading.Event().wait(self._slot * _GAP_S)  # what a member does before it arrives
                self._journal.record("arriving", barrier=barrier_id)
                barrier = self._door.arrive(barrier_id, self._name, self._slot) or barrier
                self._arrived.add(barrier_id)
            elif now_s - since_s > PATIENCE_S:
                barrier = self._door.settle_barrier(barrier_id, expired=True) or barrier
        if barrier.state is not BarrierState.OPEN:
            self._record_outcome(barrier_id, barrier)

    def _record_outcome(self, barrier_id: str, barrier: Barrier) -> None:
        if barrier_id not in self._recorded:
            self._recorded.add(barrier_id)
            self._journal.record(
                "outcome", barrier=barrier_id, state=barrier.state.value, members=barrier.members, why=barrier.reason
            )


def main() -> int:
    die_with_parent(signal.SIGKILL)
    hosts = os.environ["PSA_ZOOKEEPER"]
    job, name, slot, journals = sys.argv[1:]
    with closing(Member(hosts, job, name, int(slot), Path(journals))) as member:
        return member.run()


if __name__ == "__main__":
    sys.exit(main())
