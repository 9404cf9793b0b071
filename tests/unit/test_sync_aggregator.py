"""The synchronous aggregator of a server: what may be kept of it when the term ends in the middle of a step, and which
requests it looks at."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any, cast

from psa_store.cluster import Plan, ProcessRole
from psa_store.consistency.instructions import Applied
from psa_store.job.mode import SYNC
from psa_store.observe.metrics import Metrics
from psa_store.optim import SGD
from psa_store.optim.history import OptimizerHistory
from psa_store.server.aggregator.base import Tools
from psa_store.server.aggregator.sync import SyncAggregator
from psa_store.server.messages import Done
from psa_store.testing.journal import Journal
from psa_store.wire import Header, Kind


class Lazy:
    """Arithmetic that has been asked, and is not done."""

    def __init__(self) -> None:
        self.asked = 0

    def on_all(self, *_: Any, **__: Any) -> None:
        self.asked += 1


def aggregator_of_nothing(arithmetic: Lazy) -> SyncAggregator:
    nothing = SimpleNamespace(
        answer=lambda now: None,
        stale=False,
        awaited=(),
        begin_streaming=lambda version: False,
        clients={},
        detach_all=lambda: None,
        adopt=lambda work: None,
        advance=lambda plan, version: None,
    )
    tools = SimpleNamespace(
        config=SimpleNamespace(ranks=2, commit_every=0, commit_interval=0, mode=SYNC),
        layout=SimpleNamespace(versioned=()),
        arithmetic=arithmetic,
        committer=nothing,
        shared_parameters=nothing,
        waiters=nothing,
        relay=nothing,
        connections=nothing,
        peers={},
        journal=Journal(None, "server", "s"),
        metrics=Metrics(ProcessRole.SERVER, "s"),
        report=lambda report: None,
    )
    plan = Plan(term=1, revision=1, resume=7, servers=(), owners=(), cells=("a", "b"))
    return SyncAggregator(cast(Tools, tools), plan, {}, OptimizerHistory(SGD()))


def test_shards_in_the_middle_of_a_step_stand_at_no_version() -> None:
    """Found by reading: released then, they were kept as the version before, if that had been committed meanwhile."""
    arithmetic = Lazy()
    aggregator = aggregator_of_nothing(arithmetic)
    assert aggregator.stands_at == 7
    aggregator.advance()  # there is no wait: there are no shards
    assert arithmetic.asked == 1 and aggregator.stands_at is None
    aggregator.on_message(Done(1, Applied()))
    assert aggregator.stands_at == 8


def test_workers_that_await_the_next_version_are_looked_at_when_it_is_there() -> None:
    """Not with each AWAIT: as many workers as wait would be looked at as many times, in every step."""
    aggregator = aggregator_of_nothing(Lazy())
    assert aggregator.may_answer(Header(Kind.AWAIT, step=7)) and not aggregator.may_answer(Header(Kind.AWAIT, step=8))
    aggregator.advance()
    aggregator.on_message(Done(1, Applied()))
    assert aggregator.may_answer(Header(Kind.AWAIT, step=8))


def test_an_aggregator_that_is_over_is_gone_at_once() -> None:
    """Its shards may be gigabytes, and nothing calls the garbage collector in a server that goes on."""
    gc.disable()
    try:
        aggregator = weakref.ref(aggregator_of_nothing(Lazy()))
        assert aggregator() is None
    finally:
        gc.enable()
