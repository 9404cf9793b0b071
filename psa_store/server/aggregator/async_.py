"""The aggregator on arrival (async, ssp): each push is an update of its own, applied to each shard as it comes.

A rank's clock counts its pushes that are in a shard; clocks are committed with the shard, which is how a push counts
once whatever dies (see :mod:`psa_store.consistency.arrivals`). Workers are told, with every commit, up to which push of
each rank it reaches: those need not be kept any more. Parameters always go by value: a shard is sent whole, between two
of its updates, and other shards may have more or fewer updates than it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from psa_store.cluster import NO_WORKER, Plan
from psa_store.consistency import Arrivals, Push
from psa_store.consistency.instructions import Applied, ApplyPushes, Copied, Event, Instruction, RankCut
from psa_store.job.layout import TensorRole
from psa_store.optim.note import PLAIN, GradientNote
from psa_store.server.aggregator.base import Aggregator, Tools
from psa_store.server.messages import Committed
from psa_store.server.shard import OwnedShard
from psa_store.server.waiters import Now
from psa_store.testing.failpoints import failpoint
from psa_store.testing.journal import fingerprint_text
from psa_store.wire import Connection, Header, Kind


class AsyncAggregator(Aggregator):
    """Carries out what :class:`~psa_store.consistency.Arrivals` decides."""

    def __init__(self, tools: Tools, plan: Plan, owned_shards: Mapping[int, OwnedShard]) -> None:
        self._arrivals = Arrivals(
            {i: owned.clocks for i, owned in owned_shards.items() if owned.shard.role is not TensorRole.FROZEN},
            ahead_max=tools.config.mode.ahead_max,
            commit_interval=tools.config.commit_interval,
            committed=plan.resume,
        )
        super().__init__(tools, plan, owned_shards, self._arrivals)

    def accept(
        self,
        header: Header,
        shard: int,
        gradient: Tensor | None,
        state: Tensor | None = None,
        note: GradientNote = PLAIN,
        *,
        finite: bool,
    ) -> None:
        assert gradient is not None and state is None, "on arrival, ranks keep nothing with servers"
        if self._arrivals.accept(header.step, shard, header.rank, finite=finite):
            self.owned_shards[shard].take_gradient(header.rank, gradient, note)

    def on_rank_cut(self, cut: RankCut) -> None:
        self._arrivals.handle(cut)

    def send_state(self, peer: Connection) -> None:
        """Servers have nothing to tell each other here."""

    def send_clocks(self, connection: Connection) -> None:
        """CLOCKS: by rank, how many pushes are in all shards here, and how many in those of the last commit."""
        payload = np.array([*self._arrivals.clocks(), *self._arrivals.committed_clocks], dtype="<i8").tobytes()
        header = Header(Kind.CLOCKS, self.plan.term, self.plan.revision, self.committed, length=len(payload))
        self._tools.connections.send(connection, header, payload)

    @property
    def missing(self) -> str:
        clocks = self._arrivals.clocks()
        if not clocks:
            return ""
        rank = clocks.index(min(clocks))
        holder = self.plan.holder(rank)
        return f"push {clocks[rank]} of rank {rank} from {holder if holder != NO_WORKER else 'a worker: it has none'}"

    def on_committed(self, message: Committed) -> None:
        super().on_committed(message)
        for connection in list(self._tools.shared_parameters.clients):
            self.send_clocks(connection)

    def handle(self, event: Event) -> None:
        if isinstance(event, Applied):
            failpoint("step.applied")
        self._arrivals.handle(event)
        if isinstance(event, Applied):
            self._tools.waiters.stale = True
            self._metrics["version"] = self.version
        if isinstance(event, Applied | Copied):
            self._tools.connections.wake_parked()  # pushes that came before their turn

    def _now(self) -> Now:
        return Now(
            self.plan,
            self.version,
            self.committed,
            self.owned_shards,
            list(self.versioned.values()),
            lambda header: header.step if self._arrivals.may_start(header.step, header.rank) else None,
        )

    def _ready(self) -> list[Instruction]:
        return self._arrivals.ready(self._tools.waiters.awaited, may_copy=self._may_copy)

    def _execute(self, instruction: Instruction) -> None:
        if isinstance(instruction, ApplyPushes):
            self._apply(instruction.pushes)
        else:
            super()._execute(instruction)

    def _apply(self, pushes: Sequence[Push]) -> None:
        failpoint("step.complete")
        if self._recording:
            self._record(pushes)
        of = {push.shard: push for push in pushes}

        def work(owned: OwnedShard, scratch: Tensor) -> None:
            push = of[owned.shard.index]
            owned.apply_one(push.rank, scratch, step=push.step, finite=push.finite)

        self._tools.connections.detach_all()
        first = min(self.versioned)
        self._tools.metrics.add("skipped_steps", sum(not each.finite for each in pushes if each.shard == first))
        self._on_all([self.owned_shards[push.shard] for push in pushes], work, Applied())

    def _record(self, pushes: Sequence[Push]) -> None:
        """Write down what goes into which shard, before any process can learn of it."""
        for push in pushes:
            self._tools.journal.record(
                "updated",
                term=self.plan.term,
                shard=push.shard,
                rank=push.rank,
                step=push.step,
                sum=fingerprint_text(self.owned_shards[push.shard].fingerprints()[push.rank]),
            )
