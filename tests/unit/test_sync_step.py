"""The synchronous step as properties: several servers, gradients in any order, duplicates, refusals.

One file, since all of it moves the same machine by the same few helpers.
"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.cluster import Cut, Phase, Plan
from psa_store.cluster import Server as Owner
from psa_store.consistency import Memory, Offer, Stage, SyncStep
from psa_store.consistency.instructions import (
    Applied,
    Apply,
    Commit,
    Committed,
    Copied,
    Copy,
    CopyDelayed,
    Follow,
    Frozen,
    Hurry,
    Instruction,
    Measure,
    Measured,
    Missed,
    Move,
    Moved,
    NormsTold,
    Pinned,
    Revised,
    Skip,
    Stopped,
    TellNorms,
)
from psa_store.consistency.sync_step import Verdict

RANKS = 3
TRAINED = (0, 1, 2, 3)
BUFFERS = (4,)


def make(trained: tuple[int, ...] = TRAINED, buffers: tuple[int, ...] = BUFFERS, clip: bool = True) -> SyncStep:
    """A server that owns these shards of a job with four trained shards and one of buffers."""
    return SyncStep(
        version=10, ranks=RANKS, trained=trained, buffers=buffers, all_shards=(*TRAINED, *BUFFERS), needs_norms=clip
    )


def push(step: SyncStep, shard: int, rank: int, finite: bool = True) -> None:
    step.accept(step.version, shard, rank, finite=finite)


def push_all(step: SyncStep, shards: tuple[int, ...]) -> None:
    for shard in shards:
        for rank in range(RANKS):
            push(step, shard, rank)


def go(step: SyncStep, norm: float = 1.0) -> list[Instruction]:
    """Do what the machine says until it says nothing more, or an update is under way; returns what it said.

    What is copied is durable at once.
    """
    said: list[Instruction] = []
    while todo := step.ready():
        said += todo
        for instruction in todo:
            match instruction:
                case Measure():
                    step.handle(Measured(dict.fromkeys(instruction.shards, norm)))
                case Copy():
                    step.handle(Copied())
                case Commit():
                    step.handle(Committed(instruction.version))
    return said


def told(step: SyncStep, norm: float = 1.0) -> NormsTold:
    """What this server tells the others when its shards are complete."""
    (tell,) = [each for each in go(step, norm) if isinstance(each, TellNorms)]
    return NormsTold(tell.step, tell.squared_norms)


def outcome(step: SyncStep) -> Verdict:
    """What became of the step that was collected: what was applied is ended."""
    said = go(step)
    if any(isinstance(each, Skip) for each in said):
        return Verdict.SKIP
    if step.stage is Stage.APPLYING:
        step.handle(Applied())
        return Verdict.APPLY
    return Verdict.WAIT


@given(st.randoms(use_true_random=False), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=60))
def test_applies_exactly_when_everything_has_arrived_once(rng: random.Random, noise: list[tuple[int, int]]) -> None:
    step = make()
    needed = {(shard, rank) for shard in TRAINED for rank in range(RANKS)} | {(4, 0)}
    arrivals = [*needed, *noise]
    rng.shuffle(arrivals)
    seen: set[tuple[int, int]] = set()
    for shard, rank in arrivals:
        fresh = (shard, rank) in needed - seen
        assert (step.offer(10, shard, rank) is Offer.NEW) == fresh
        assert step.accept(10, shard, rank) == fresh
        seen.add((shard, rank))
        applies = [each for each in go(step) if isinstance(each, Apply)]
        assert applies == ([Apply(10, [1.0] * 4 + [0.0])] if fresh and needed <= seen else [])
    step.handle(Applied())
    assert step.version == 11
    assert all(step.offer(10, shard, rank) is Offer.DUPLICATE for shard, rank in needed)
    assert step.offer(12, 0, 0) is Offer.AHEAD


def test_a_server_waits_for_the_shards_of_the_others() -> None:
    here, there = make(trained=(0, 1)), make(trained=(2, 3), buffers=())
    push_all(here, (0, 1))
    push(here, 4, 0)
    assert not any(isinstance(each, Apply) for each in go(here))
    push_all(there, (2, 3))
    here.handle(told(there))
    assert go(here) == [Apply(10, [1.0] * 4 + [0.0])]


def test_a_server_does_not_go_ahead_without_the_buffers_of_another() -> None:
    """Found by killing all workers: rank 0 died after its gradients and before its buffers had left."""
    here, there = make(trained=(0, 1), buffers=()), make(trained=(2, 3))
    push_all(here, (0, 1))
    push_all(there, (2, 3))
    assert not any(isinstance(each, TellNorms) for each in go(there))
    of_here = told(here)
    assert outcome(here) is Verdict.WAIT
    push(there, 4, 0)
    here.handle(told(there))
    there.handle(of_here)
    assert outcome(here) is outcome(there) is Verdict.APPLY


def test_norms_of_the_next_step_may_come_early_but_count_only_then() -> None:
    here = make(trained=(0, 1), buffers=())
    here.handle(NormsTold(11, {2: 5.0, 3: 5.0, 4: 0.0}))
    push_all(here, (0, 1))
    assert outcome(here) is Verdict.WAIT
    here.handle(NormsTold(10, {2: 1.0, 3: 1.0, 4: 0.0}))
    assert outcome(here) is Verdict.APPLY
    push_all(here, (0, 1))
    assert go(here)[-1] == Apply(11, [1.0, 1.0, 5.0, 5.0, 0.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_skipped_by_all_alike(bad: float) -> None:
    here, there = make(trained=(0, 1), buffers=()), make(trained=(2, 3))
    push(there, 4, 0)
    push_all(here, (0,))
    go(here)
    push_all(here, (1,))
    of_here = told(here, norm=bad)
    push_all(there, (2, 3))
    here.handle(told(there))
    there.handle(of_here)
    assert outcome(here) is outcome(there) is Verdict.SKIP
    assert here.version == there.version == 11


@pytest.mark.parametrize("clip", [True, False])
def test_one_gradient_that_is_not_finite_makes_all_skip_with_and_without_clipping(clip: bool) -> None:
    here, there = make(trained=(0, 1), buffers=(), clip=clip), make(trained=(2, 3), clip=clip)
    push(there, 4, 0)
    push(here, 1, 2, finite=False)
    push_all(here, (0, 1))
    push_all(there, (2, 3))
    of_here = told(here)
    here.handle(told(there))
    there.handle(of_here)
    assert outcome(here) is outcome(there) is Verdict.SKIP
    push_all(here, (0, 1))
    push(there, 4, 0)
    push_all(there, (2, 3))
    here.handle(told(there))
    assert outcome(here) is Verdict.APPLY


def test_without_clipping_a_shard_is_complete_with_its_last_gradient() -> None:
    step = make(clip=False)
    push_all(step, TRAINED)
    push(step, 4, 0)
    assert step.ready() == [TellNorms(10, dict.fromkeys(range(5), 0.0)), Apply(10, [0.0] * 5)]


@given(st.randoms(use_true_random=False), st.integers(0, RANKS - 1))
def test_with_backup_ranks_the_first_to_come_count_and_no_others(rng: random.Random, backup: int) -> None:
    step = SyncStep(
        version=0, ranks=RANKS, trained=(0, 1), buffers=(2,), all_shards=(0, 1, 2), needs_norms=True, backup=backup
    )
    arrivals = [(shard, rank) for shard in range(3) for rank in range(RANKS)]
    rng.shuffle(arrivals)
    counted: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for shard, rank in arrivals:
        if step.offer(0, shard, rank) is Offer.NEW:
            counted[shard].append(rank)
            push(step, shard, rank)
            go(step)
        whole = all(len(counted[s]) == RANKS - backup for s in (0, 1)) and len(counted[2]) == 1
        assert step.stage is (Stage.APPLYING if whole else Stage.COLLECTING)
    first_of = {shard: [rank for s, rank in arrivals if s == shard] for shard in counted}
    for shard in (0, 1):
        assert counted[shard] == first_of[shard][: RANKS - backup]
    assert counted[2] == (first_of[2][:1] if backup else [0])


@given(st.randoms(use_true_random=False), st.integers(1, 3), st.integers(0, 5))
def test_a_shard_that_is_not_pushed_in_a_step_is_not_waited_for(
    rng: random.Random, fragments: int, version: int
) -> None:
    step = SyncStep(
        version=version,
        ranks=RANKS,
        trained=TRAINED,
        buffers=(),
        all_shards=TRAINED,
        needs_norms=False,
        pushed=lambda shard, at: (shard - at) % fragments == 0,
    )
    for _ in range(2 * fragments):
        awaited = [(s, r) for s in TRAINED if (s - step.version) % fragments == 0 for r in range(RANKS)]
        rng.shuffle(awaited)
        for shard, rank in awaited:
            assert step.ready() == []
            assert step.clocks(RANKS)[rank] == step.version
            push(step, shard, rank)
        for shard in TRAINED:
            assert step.offer(step.version, shard, 0) is Offer.DUPLICATE
        assert step.clocks(RANKS) == [step.version + 1] * RANKS
        assert outcome(step) is Verdict.APPLY


class Server:
    """One of two servers whose connection breaks, with whatever was on its way."""

    def __init__(self, trained: tuple[int, ...], buffers: tuple[int, ...]) -> None:
        self.step = make(trained=trained, buffers=buffers)
        self.shards = trained
        self.buffers = buffers
        self.inbox: list[NormsTold] = []

    def work(self, peer: Server) -> None:
        """Take the gradients of the step, tell the norms once, and go on if that is possible."""
        push_all(self.step, self.shards)
        for shard in self.buffers:
            push(self.step, shard, 0)
        for said in go(self.step):
            if isinstance(said, TellNorms):
                peer.inbox.append(NormsTold(said.step, said.squared_norms))
            elif isinstance(said, Apply):
                self.step.handle(Applied())

    def receive(self) -> None:
        if self.inbox:
            self.step.handle(self.inbox.pop(0))


@given(st.lists(st.sampled_from(["here", "there", "to here", "to there", "break"]), max_size=80))
def test_a_connection_that_breaks_between_servers_stops_neither(actions: list[str]) -> None:
    """Found by `psa chaos run --scenario cut-server-server --seed 0`: norms that were lost were never said again."""
    here, there = Server((0, 1), ()), Server((2, 3), (4,))

    def connect_again() -> None:
        for server, peer in ((here, there), (there, here)):
            peer.inbox = [NormsTold(*each) for each in server.step.norms_to_repeat().items()]

    for action in actions:
        match action:
            case "here":
                here.work(there)
            case "there":
                there.work(here)
            case "to here":
                here.receive()
            case "to there":
                there.receive()
            case _:
                connect_again()
        assert abs(here.step.version - there.step.version) <= 1
    connect_again()
    reached = here.step.version
    for _ in range(8):
        for server, peer in ((here, there), (there, here)):
            server.work(peer)
            peer.receive()
            server.receive()
    assert min(here.step.version, there.step.version) > reached


@given(st.lists(st.sampled_from(["step", "first", "second", "told", "bare", "break"]), max_size=30))
def test_a_server_that_owns_nothing_that_changes_is_where_the_others_are(actions: list[str]) -> None:
    """Found by a job that never ended: none waits for such a server, and steps that it was told of were dropped."""
    first, second, bare = Server((0, 1), ()), Server((2, 3), (4,)), Server((), ())
    told: list[NormsTold] = []

    def work(server: Server, peer: Server) -> None:
        before = len(peer.inbox)
        server.work(peer)
        told.extend(peer.inbox[before:])
        peer.receive()

    def take() -> None:
        """All that has come, before anything is done: one turn of the event loop."""
        for each in told:
            bare.step.handle(each)
        told.clear()

    for action in actions:
        match action:
            case "step":
                for server, peer in ((first, second), (second, first), (first, second)):
                    work(server, peer)
            case "first":
                work(first, second)
            case "second":
                work(second, first)
            case "told":
                take()
            case "bare":
                bare.work(Server((), ()))
            case _:
                told = [
                    NormsTold(*each) for server in (first, second) for each in server.step.norms_to_repeat().items()
                ]
        assert bare.step.version <= 1 + max(first.step.version, second.step.version)
    take()
    bare.work(Server((), ()))
    bare.work(Server((), ()))
    assert bare.step.version >= min(first.step.version, second.step.version)


def test_it_says_at_which_version_it_is_when_it_has_caught_up() -> None:
    bare = make(trained=(), buffers=())
    bare.handle(NormsTold(14, {0: 1.0}))
    assert bare.ready()[0] == Follow(14)
    assert bare.version == 14
    bare.handle(NormsTold(14, {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.0}))
    assert Apply(14, [1.0] * 4 + [0.0]) in bare.ready()
    bare.handle(Applied())
    assert bare.version == 15


# --- what a server does besides applying


def alone(**changes: int) -> SyncStep:
    """A server that owns the only shard of a job; each push of its only rank completes a step."""
    return SyncStep(
        version=0,
        ranks=1,
        trained=(0,),
        buffers=(),
        all_shards=(0,),
        needs_norms=False,
        **{"commit_every": 0, **changes},
    )


SERVER = Owner("s", "127.0.0.1:1", "@s", "host")


def plan(**changes: object) -> Plan:
    fields = {"term": 3, "revision": 1, "resume": 0, "servers": (SERVER,), "owners": (0,), "cells": ("w",), **changes}
    return Plan(**fields)  # type: ignore[arg-type]


def step_on(step: SyncStep) -> list[Instruction]:
    """One more step, up to its update; returns what the machine says after it."""
    push(step, 0, 0)
    go(step)
    step.handle(Applied())
    return go(step)


def test_a_version_is_copied_before_it_may_change() -> None:
    step = alone(commit_every=2)
    assert step_on(step) == []
    push(step, 0, 0)
    go(step)
    step.handle(Applied())
    push(step, 0, 0)  # the next step is complete, and has to wait
    assert step.ready() == [Copy(2, (0,))] and step.stage is Stage.SNAPPING
    assert step.ready() == []
    step.handle(CopyDelayed())
    assert step.ready(may_copy=False) == [], "a commit still reads the copies: training waits"
    assert step.ready() == [Copy(2, (0,))]
    step.handle(Copied())
    said = step.ready()
    assert said[0] == Commit(2, None) and isinstance(said[-1], Apply)
    step.handle(Applied())
    step.handle(Committed(2))
    assert step.committed == 2 and step.version == 3


def test_what_workers_wait_for_is_committed_and_hurried() -> None:
    step = alone()
    step_on(step)
    assert step.ready(awaited={2}) == []
    assert step.ready(awaited={1}) == [Copy(1, (0,))]
    step.handle(Copied())
    assert step.ready(awaited={1}) == [Commit(1, None), Hurry()]
    assert step.ready(awaited={1}) == [], "once is enough"
    step.handle(Committed(1))
    assert step.ready(awaited={1}) == []


def test_memory_that_is_still_read_is_not_written_to() -> None:
    step = alone()
    push(step, 0, 0)
    assert step.ready(Memory.READ_BY_HOLDERS) == [TellNorms(0, {0: 0.0})]
    assert step.ready(Memory.READ_BY_HOLDERS) == []
    assert step.ready(Memory.READ_BY_OTHERS) == [Move()] and step.stage is Stage.MOVING
    step.handle(Moved())
    assert step.ready() == [Apply(0, [0.0])]
    assert step.stands_at is None
    step.handle(Applied())
    assert step.stands_at == 1


def test_a_frozen_server_says_so_once_and_applies_nothing() -> None:
    step = alone()
    step.handle(Revised(plan(phase=Phase.FREEZE, freeze_revision=5)))
    push(step, 0, 0)
    assert step.ready() == [TellNorms(0, {0: 0.0}), Frozen(5, 0, 0)]
    assert step.ready() == []
    step.handle(Revised(plan(revision=2)))
    assert step.ready() == [Apply(0, [0.0])]


def test_a_server_stops_at_the_version_of_the_plan_and_says_so_when_it_is_durable() -> None:
    step = alone()
    step.handle(Revised(plan(phase=Phase.STOP, stop_version=1)))
    push(step, 0, 0)
    assert go(step)[-1] == Apply(0, [0.0])
    step.handle(Applied())
    push(step, 0, 0)
    assert step.ready() == [Copy(1, (0,))]
    step.handle(Copied())
    assert step.ready() == [Commit(1, None), TellNorms(1, {0: 0.0}), Hurry()]
    step.handle(Committed(1))
    assert step.ready() == [Stopped(1)]
    assert step.ready() == []


def test_a_checkpoint_is_pinned_where_it_is_asked_for_or_missed() -> None:
    step = alone()
    step_on(step)
    step.handle(Revised(plan(cut=Cut("c", "1", 1))))
    assert step.ready() == [Copy(1, (0,))]
    step.handle(Copied())
    assert step.ready() == [Commit(1, Cut("c", "1", 1))]
    step.handle(Committed(1))
    step.handle(Revised(plan(revision=2)))
    late = Cut("d", "2", 0)
    step.handle(Revised(plan(revision=3, cut=late)))
    assert step.ready() == [Missed(3, late)]
    assert step.ready() == []


def test_a_server_whose_shards_never_change_has_what_a_checkpoint_needs() -> None:
    step = SyncStep(version=7, ranks=1, trained=(), buffers=(), all_shards=(0,), needs_norms=False)
    cut = Cut("c", "1", 9)
    step.handle(Revised(plan(resume=7, cut=cut)))
    assert Pinned(3, cut, 9) in step.ready()
