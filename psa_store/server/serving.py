"""The terms that a server serves, one after the other: a term is begun, revised, and released for the next.

Used by the event loop's thread only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from psa_store import logs
from psa_store.cluster import Plan
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout
from psa_store.observe.metrics import Metrics
from psa_store.server.aggregator import Aggregator, Tools, make_aggregator
from psa_store.server.arithmetic import Arithmetic
from psa_store.server.committer import Committer
from psa_store.server.frame_handler import FrameHandler
from psa_store.server.messages import CannotServe, Join, Lost, Released, Serve, ToEventLoop, ToPlanFollower
from psa_store.testing.journal import Journal


class Serving:
    """What is served now: the shards of one term, by its aggregator; or nothing."""

    def __init__(
        self,
        *,
        config: JobConfig,
        layout: Layout,
        arithmetic: Arithmetic,
        committer: Committer,
        frames: FrameHandler,
        journal: Journal,
        metrics: Metrics,
        report: Callable[[ToPlanFollower], None],
        post: Callable[[ToEventLoop], None],
    ) -> None:
        self._frames = frames
        self._committer = committer
        self._arithmetic = arithmetic
        self._journal = journal
        self._metrics = metrics
        self._report = report
        self._log = logs.get_logger()
        self._is_first = False
        """Whether the plan that was served last names this server first."""
        self._tools = Tools(
            config=config,
            layout=layout,
            arithmetic=arithmetic,
            committer=committer,
            shared_parameters=frames.parameters,
            waiters=frames.waiters,
            relay=frames.relay,
            connections=frames.connections,
            peers=frames.peers,
            journal=journal,
            metrics=metrics,
            report=report,
            post=post,
        )

    @property
    def aggregator(self) -> Aggregator | None:
        return self._frames.aggregator

    @property
    def finished(self) -> int | None:
        """The version with which the job ended, in the server that the plan names first; None elsewhere and before."""
        return self._frames.waiters.finished if self._is_first else None

    def begin(self, serve: Serve) -> None:
        """Serve the shards of a new term."""
        plan = serve.plan
        if plan.servers:
            self._is_first = plan.servers[0].id == serve.member
        aggregator = make_aggregator(self._tools, plan, dict(serve.owned_shards), serve.history)
        self._frames.begin(serve.member, serve.memory, aggregator)
        for server, sock in serve.peers.items():
            self._frames.add_peer(server, sock)
        self._journal.record(
            "serving",
            term=plan.term,
            resume=plan.resume,
            member=serve.member,
            shards=list(aggregator.owned_shards),
            versioned=len(aggregator.versioned),
            trained=Counter(owned.shard.home for owned in aggregator.trained),
            clocks={i: owned.clocks for i, owned in aggregator.versioned.items() if owned.clocks},
        )
        self._metrics.set("term", plan.term)
        self._metrics.set("shards", len(aggregator.owned_shards))
        self._log.info("serving", term=plan.term, version=plan.resume, shards=len(aggregator.owned_shards))
        self._frames.connections.wake_parked()

    def revise(self, plan: Plan) -> None:
        """The same term, but other ranks or another phase."""
        if self.aggregator is not None and self.aggregator.plan.term == plan.term:
            self.aggregator.revise(plan)
            self._frames.revise(plan, self.aggregator.version)

    def join(self, join: Join) -> None:
        """Take a new connection to another server."""
        self._frames.add_peer(join.server, join.sock)

    def release(self, term: int) -> None:
        """Let go of everything: ``term`` begins. What stands at a committed version can be used again in it."""
        aggregator = self.aggregator
        version = None if aggregator is None else aggregator.stands_at
        owned_shards = aggregator.owned_shards if aggregator is not None and aggregator.committed == version else {}
        self.end()
        self._committer.begin(term)
        self._report(Released(version, owned_shards))

    def lose(self, lost: Lost) -> None:
        """The shards are lost to this server."""
        self._log.error("lost the shards of this term", term=lost.term, why=lost.why)
        self._report(CannotServe(lost.term, lost.why))
        self.end()

    def end(self) -> None:
        """Serve nothing; afterwards no thread touches the memory of the old term but an unfinished commit."""
        self._arithmetic.settle()
        if self.aggregator is not None:
            self.aggregator.end()
        self._frames.end()
        self._metrics.set("shards", 0)
