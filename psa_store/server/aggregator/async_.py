"""The course on arrival (async, ssp): each push is an update of its own, applied to each shard as it comes.

A rank's clock counts its pushes that are in a shard; clocks are committed with the shard, which is how a push counts
once whatever dies (see :mod:`psa_store.consistency.arrivals`). Workers are told, with every commit, up to which push of
each rank it reaches: those need not be kept any more. Parameters always go by value: a shard is sent whole, between two
of its updates, and other shards may have more or fewer updates than it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from psa_store.cluster import Phase, Plan
from psa_store.consistency import Arrivals, Offer, Update
from psa_store.server.aggregator.base import Aggregator, Done, Tools
from psa_store.server.messages import Applied, Committed, Snapped
from psa_store.server.shard import OwnedShard
from psa_store.server.waiters import Now
from psa_store.testing.failpoints import failpoint
from psa_store.testing.journal import fingerprint_text
from psa_store.wire import Connection, Flag, Header, Kind


class AsyncAggregator(Aggregator):
    """See the module. One thing at a time is done to the shards: updates, or copies for a commit."""

    def __init__(self, tools: Tools, plan: Plan, owned_shards: Mapping[int, OwnedShard]) -> None:
        super().__init__(tools, plan, owned_shards)
        config = tools.config
        self._arrivals = Arrivals(
            {i: owned.clocks for i, owned in self.versioned.items()},
            lead_max=config.mode.lead_max,
            commit_interval=config.commit_interval,
            committed=plan.resume,
        )
        self._under_way: Sequence[Update] = ()
        self._copying: Sequence[int] = ()
        self._reserved = False
        self._committed_clocks = self._arrivals.clocks()
        self._copied_clocks: dict[int, list[int]] = {}
        """By version that is being committed."""

    @property
    def version(self) -> int:
        return self._arrivals.version if self.versioned else self.committed

    @property
    def stage(self) -> str:
        return "applying" if self._under_way else "snapping" if self._copying else "collecting"

    @property
    def stands_at(self) -> int | None:
        still = not self._under_way and self._arrivals.version == self._arrivals.newest
        return self._arrivals.version if still else None

    def offer(self, header: Header, shard: int) -> Offer:
        return self._arrivals.offer(header.step, shard, header.rank)

    def accept(self, header: Header, shard: int, gradient: Tensor | None, state: Tensor | None = None) -> None:
        assert gradient is not None and state is None, "on arrival, ranks keep nothing with servers"
        self.owned_shards[shard].take_gradient(header.rank, gradient)
        self._arrivals.accept(header.step, shard, header.rank, finite=not header.flags & Flag.NONFINITE)

    def revise(self, plan: Plan) -> None:
        if plan.cut != self.plan.cut:
            self._arrivals.forget_cut()
        super().revise(plan)
        stop = plan.stop_version
        if stop is not None and not self.versioned:
            self.committed = stop  # nothing here changes, so nothing is to be reached or committed
        self._arrivals.limit = stop
        if stop is not None:
            self._arrivals.commit_at(stop)

    def cut_rank(self, barrier: int, rank: int, clock: int) -> None:
        if self._cut is None or int(self._cut.barrier) != barrier:
            return  # of a checkpoint that is over
        if not self._arrivals.cut_rank(rank, clock):
            self._miss()
            self._arrivals.forget_cut()

    def send_state(self, peer: Connection) -> None:
        """Servers have nothing to tell each other here."""

    def send_clocks(self, connection: Connection) -> None:
        """CLOCKS: by rank, how many pushes are in all shards here, and how many in those of the last commit."""
        payload = np.array([*self._arrivals.clocks(), *self._committed_clocks], dtype="<i8").tobytes()
        header = Header(Kind.CLOCKS, self.plan.term, self.plan.revision, self.committed, length=len(payload))
        self._tools.connections.send(connection, header, payload)

    def on_committed(self, message: Committed) -> None:
        super().on_committed(message)
        # A version that is committed a second time, to be pinned, may have been copied before the first was reported.
        self._committed_clocks = self._copied_clocks.pop(message.version, self._committed_clocks)
        for connection in list(self._tools.shared_parameters.clients):
            self.send_clocks(connection)

    def handle(self, message: Done) -> None:
        match message:
            case Applied():
                failpoint("step.applied")
                for update in self._under_way:
                    self._arrivals.applied(update)
                self._under_way = ()
                self._tools.metrics.set("version", self.version)
                self._tools.connections.wake_parked()
            case Snapped():
                copied, self._copying = self._copying, ()
                version = self._arrivals.commits_next
                if self._arrivals.copied(copied):
                    self._reserved = False
                    clocks = [owned.copied_clocks for owned in self.versioned.values()]
                    self._copied_clocks[version] = [min(each) for each in zip(*clocks, strict=True)]
                    pin = self._cut if version == self._arrivals.cut else None
                    if pin is not None:
                        self._cut = None
                        self._arrivals.forget_cut()
                    self._tools.committer.submit(self._work(version, pin))
                    self._tools.connections.wake_parked()

    def end(self) -> None:
        if self._reserved:
            self._tools.committer.cancel()

    def advance(self) -> None:
        """Do what can be done now: answer, copy for the next commit, apply."""
        if self._under_way or self._copying:
            return
        for version in self._tools.pending.finishes():
            self._arrivals.commit_at(version)
        self._tools.pending.answer(
            Now(
                self.plan,
                self.version,
                self.committed,
                self.owned_shards,
                list(self.versioned.values()),
                self._tools.shared_parameters,
                self._reached,
                by_value=True,
            )
        )
        newest = self._arrivals.newest if self.versioned else self.version
        if self._held(self.version, newest) and self.plan.phase is Phase.FREEZE:
            return
        if (shards := self._arrivals.to_copy()) and self._reserve():
            self._copying = shards
            self._tools.arithmetic.on_all(
                self.plan.term,
                [self.owned_shards[shard] for shard in shards],
                lambda owned, _: owned.take_snapshot(),
                Snapped(self.plan.term, self._arrivals.commits_next),
                inline=self._inline,
            )
        elif updates := self._arrivals.due():
            self._apply(updates)

    def _reached(self, header: Header) -> int | None:
        may = not self.versioned or self._arrivals.may_start(header.step, header.rank)
        return header.step if may else None

    def _reserve(self) -> bool:
        """Have the memory of snapshots; False while a commit reads it: if storage is slower, training waits."""
        self._reserved = self._reserved or self._tools.committer.reserve()
        return self._reserved

    def _apply(self, updates: Sequence[Update]) -> None:
        failpoint("step.complete")
        self._record(updates)
        of = {update.shard: update for update in updates}

        def work(owned: OwnedShard, scratch: torch.Tensor) -> None:
            update = of[owned.shard.index]
            owned.apply_one(update.rank, scratch, step=update.step, finite=update.finite)

        self._tools.connections.detach_all()
        first = min(self.versioned)
        self._tools.metrics.add("skipped_steps", sum(not each.finite for each in updates if each.shard == first))
        self._under_way = updates
        self._tools.arithmetic.on_all(
            self.plan.term,
            [self.owned_shards[update.shard] for update in updates],
            work,
            Applied(self.plan.term),
            inline=self._inline,
        )

    def _record(self, updates: Sequence[Update]) -> None:
        """Write down what goes into which shard, before anybody can learn of it."""
        journal = self._tools.journal
        if not journal.enabled:
            return
        for update in updates:
            journal.record(
                "updated",
                term=self.plan.term,
                shard=update.shard,
                rank=update.rank,
                step=update.step,
                sum=fingerprint_text(self.owned_shards[update.shard].fingerprints()[update.rank]),
            )
