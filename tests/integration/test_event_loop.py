"""The event loop of a server over real sockets: what workers are told, and when. Tests say when a commit is done."""

from __future__ import annotations

import itertools
import math
import queue
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import cast

import numpy as np
import pytest
import torch

from psa_store.cluster import Member, Plan, ProcessRole, Server
from psa_store.coordination import Lease
from psa_store.job.config import JobConfig
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.job.wire_layout import WireLayout
from psa_store.logs import Waits
from psa_store.observe.metrics import Metrics
from psa_store.optim import SGD
from psa_store.optim.history import OptimizerHistory
from psa_store.server.committer import Committer
from psa_store.server.entrance import Limits
from psa_store.server.event_loop import EventLoop
from psa_store.server.messages import Committed, Lost, Release, Revise, Serve
from psa_store.server.shard import OwnedShard
from psa_store.server.work import Work
from psa_store.storage import Manifest
from psa_store.testing.journal import Journal
from psa_store.wire import Door, Kind, SharedMemory, host_identity, listen_tcp
from tests.integration.peers import Peer

NUMBERS = itertools.count()
NUMEL = 4 << 20
"""More bytes than lie in the buffers between two sockets."""
LAYOUT = make_layout([TensorSpec(("weight",), (NUMEL,), "float32", TensorRole.TRAINED)], shard_bytes=4 * NUMEL)
RESUME = 4


class Ledger:
    """A committer whose commits are under way until the test says that they are done."""

    def __init__(self, post: Callable[[Committed | Lost], None]) -> None:
        self._post = post
        self.works: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._reserved = False

    def reserve(self) -> bool:
        free, self._reserved = not self._reserved, True
        return free

    def submit(self, work: Work) -> None:
        self.works.put(work)

    def be_done(self) -> None:
        """Have what is being committed be durable."""
        work = self.works.get(timeout=120)
        self._reserved = False
        self._post(Committed(work.term, work.version, {}))

    def cancel(self) -> None:
        self._reserved = False

    def hurry(self) -> None:
        pass

    def begin(self, term: int) -> None:
        pass

    def adopt(self, work: Work) -> None:
        pass

    def close(self) -> None:
        pass


class Scene:
    """A server of one shard, in this process, and a job of one rank."""

    def __init__(self, kept: ExitStack) -> None:
        name = f"event-loop-{next(NUMBERS)}"
        self._config = JobConfig(name, 1, 0, SGD(lr=1.0).to_dict(), LAYOUT.fingerprint, commit_every=0)
        listener, address = listen_tcp("127.0.0.1")
        self.member = Member("server", host_identity(), 1, address=address)
        self.reports: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.ledger: Ledger

        def make_ledger(post: Callable[[Committed | Lost], None]) -> Committer:
            self.ledger = Ledger(post)
            return cast(Committer, self.ledger)

        self.loop = EventLoop(
            member="server",
            config=self._config,
            layout=LAYOUT,
            wire=WireLayout(LAYOUT),
            threads=1,
            listeners=[listener],
            lease=Lease(math.inf),
            make_committer=make_ledger,
            report=self.reports.put,
            journal=Journal(None, "server", "server"),
            metrics=Metrics(ProcessRole.SERVER, "server"),
            waits=Waits(),
            door=Door(name),
            limits=Limits.of(1024),
        )
        self.loop.start()
        kept.callback(self.loop.close)
        self._kept = kept
        self.plan = Plan(1, 1, RESUME, (Server("server", address, "", self.member.host),), (0,), ("holder",))
        self.serve(self.plan)

    def serve(self, plan: Plan) -> None:
        """Begin a term; every parameter is the version with which it begins."""
        self.plan = plan
        memory = SharedMemory.create("test", LAYOUT.arena_bytes)
        history = OptimizerHistory(SGD(lr=1.0))
        owned = OwnedShard(LAYOUT.shards[0], LAYOUT, WireLayout(LAYOUT), SGD(lr=1.0), memory)
        owned.param.fill_(float(plan.resume))
        owned.loaded(Manifest(plan.resume, plan.term, "", (), {}))
        owned.history = history
        self.loop.post(Release(plan.term))
        self.loop.post(Serve("server", plan, {0: owned}, memory, history, {}))

    def peer(self, name: str) -> Peer:
        peer = Peer(self.member, "tcp", self._config.name, LAYOUT, self.plan)
        self._kept.enter_context(closing(peer))
        peer.hello(name, by_reference=False)
        return peer


GRADIENT = np.full(NUMEL, -1.0, dtype="<f4").tobytes()


def push(peer: Peer, step: int) -> None:
    """A gradient that makes the next version: each parameter grows by one."""
    peer.say(Kind.PUSH, GRADIENT, step=step)


def kinds_until(peer: Peer, last: Kind) -> set[Kind]:
    """What comes before the first frame of a kind."""
    kinds = set()
    while (frame := peer.next()) is not None and frame.header.kind is not last:
        kinds.add(frame.header.kind)
    assert frame is not None
    return kinds


@pytest.fixture
def scene() -> Iterator[Scene]:
    with ExitStack() as kept:
        yield Scene(kept)


def test_a_worker_is_told_that_a_version_is_durable_when_it_is(scene: Scene) -> None:
    peer = scene.peer("holder")
    peer.say(Kind.FINISH, step=RESUME + 1)
    push(peer, RESUME)
    peer.say(Kind.AWAIT, step=RESUME + 1)
    assert Kind.DURABLE not in kinds_until(peer, Kind.VERSION)
    peer.say(Kind.INSPECT)
    assert Kind.DURABLE not in kinds_until(peer, Kind.REPORT)
    scene.ledger.be_done()
    assert peer.next_of(Kind.DURABLE).header.step == RESUME + 1


def test_news_of_a_term_that_is_over_change_nothing(scene: Scene) -> None:
    before = scene.plan
    scene.serve(Plan(2, 1, RESUME + 10, before.servers, before.owners, before.cells))
    scene.loop.post(Committed(1, RESUME + 50, {}))
    scene.loop.post(Lost(1, "fenced"))
    peer = scene.peer("holder")
    peer.see_version(RESUME + 10)
    report = peer.report()
    assert (report["term"], report["version"], report["committed"]) == (2, RESUME + 10, RESUME + 10)
    push(peer, RESUME + 10)
    peer.see_version(RESUME + 11)


def test_a_push_of_a_plan_that_is_yet_to_come_waits_for_it(scene: Scene) -> None:
    """The worker has read it first: there the rank is its own."""
    revised = Plan(1, 2, RESUME, scene.plan.servers, scene.plan.owners, ("heir",))
    peer = scene.peer("heir")
    peer.say(Kind.PUSH, step=RESUME, revision=2, length=len(GRADIENT))
    other = scene.peer("other")
    other.see_version(RESUME)
    assert other.report()["version"] == RESUME
    scene.loop.post(Revise(revised))
    peer.throw(GRADIENT)
    peer.see_version(RESUME + 1)


def test_what_a_slow_reader_gets_is_of_one_version(scene: Scene) -> None:
    """Parameters change where they lie, while what was asked for is still on its way."""
    slow, holder = scene.peer("slow"), scene.peer("holder")
    slow.say(Kind.PULL, step=RESUME)
    assert slow.next_of(Kind.WELCOME) and slow.sock.recv(1, socket.MSG_PEEK), "the answer has begun to come"
    for step in range(RESUME, RESUME + 2):
        push(holder, step)
        holder.see_version(step + 1)
    frame = slow.next_of(Kind.PARAMS)
    values = torch.frombuffer(bytearray(frame.payload), dtype=torch.float32)
    assert frame.header.step == RESUME and bool((values == float(RESUME)).all())
