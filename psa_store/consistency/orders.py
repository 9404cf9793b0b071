"""What the plan asks of a server besides training: stand still, stop at a version, take a checkpoint.

Part of both machines, which differ in how they get where the plan wants them. Pure: no I/O, no threads, no clock.
"""

from __future__ import annotations

from psa_store.cluster import Cut, Phase, Plan
from psa_store.consistency.instructions import Frozen, Missed, Pinned, Report, Stopped


class Orders:
    """The orders of the present plan, and what was answered to them. ``committed``: the newest durable version."""

    def __init__(self, committed: int) -> None:
        self.committed = committed
        self.cut: Cut | None = None
        """The checkpoint that is asked for and that is not committed here yet."""
        self.waited_for = False
        """Whether a hand-over waits for this server."""
        self.frozen = False
        """Whether all shards are to stand still where they are."""
        self.stop_version: int | None = None
        self._plan: Plan | None = None
        self._told: Report | None = None

    def revise(self, plan: Plan) -> bool:
        """Take a new plan; True if it names another checkpoint than the one before, or none."""
        changed = plan.cut != (self._plan.cut if self._plan is not None else None)
        if changed:
            self.cut = plan.cut
        self._plan = plan
        self._told = None
        self.waited_for = plan.phase is not Phase.RUN
        self.frozen = plan.phase is Phase.FREEZE
        self.stop_version = plan.stop_version
        return changed

    def stopped(self, version: int) -> bool:
        return self.stop_version is not None and version >= self.stop_version

    def answers(self, version: int, newest: int) -> list[Report]:
        """What the plan waits to be told now, once. ``version``: what all shards here have; ``newest``: some."""
        report: Report | None = None
        if self.frozen:
            assert self._plan is not None and self._plan.freeze_revision is not None
            report = Frozen(self._plan.freeze_revision, version, newest)
        elif self.stopped(version) and self.committed == version:
            report = Stopped(version)
        if report is None or report == self._told:
            return []
        self._told = report
        return [report]

    def take_cut(self) -> Cut | None:
        """The checkpoint is being committed, or missed: it is asked for no longer."""
        cut, self.cut = self.cut, None
        return cut

    def miss(self) -> list[Report]:
        """The checkpoint cannot be taken here any more."""
        cut = self.take_cut()
        assert self._plan is not None and cut is not None
        return [Missed(self._plan.term, cut)]

    def pin_nothing(self) -> list[Report]:
        """Nothing here ever changes: a checkpoint has what it needs."""
        cut = self.take_cut()
        assert self._plan is not None and cut is not None
        return [Pinned(self._plan.term, cut, self._plan.resume if cut.version is None else cut.version)]
