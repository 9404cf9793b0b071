"""Members meet at Kazoo's DoubleBarrier: its sign of success outlives them, and then one alone passes."""

from __future__ import annotations

import threading
from dataclasses import replace

from kazoo.recipe.barrier import DoubleBarrier

from psa_store.coordination import Barrier, BarrierState, Coordination
from psa_store.job.document import to_text

_INSIDE_S = 0.3
"""Between entering and leaving: what the barrier is for."""


def plant() -> None:
    """Have :meth:`Coordination.arrive` enter a DoubleBarrier of as many clients as there are members."""

    def arrive(self: Coordination, barrier_id: str, member: str, version: int) -> Barrier | None:
        barrier = self.read_barrier(barrier_id)
        if barrier is not None and barrier.state is BarrierState.OPEN:
            double = DoubleBarrier(self._session._client, f"{self._job}/double", len(barrier.members), member)
            thread = threading.Thread(target=pass_it, args=(self, double, barrier_id, barrier), daemon=True)
            thread.start()
        return barrier

    def pass_it(door: Coordination, double: DoubleBarrier, barrier_id: str, barrier: Barrier) -> None:
        double.enter()
        done = to_text(replace(barrier, state=BarrierState.DONE))
        door._session.run(lambda requests: requests.set(f"{door._barriers}/{barrier_id}", done, 0))
        threading.Event().wait(_INSIDE_S)
        double.leave()

    Coordination.arrive = arrive  # type: ignore[method-assign]
