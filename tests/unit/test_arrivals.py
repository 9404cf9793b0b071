"""Pushes that are applied on arrival, as properties: two servers, ranks that come and go, and whatever may be lost.

One file, since the larger part of it is one state machine, whose rules share what they know of the job.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from psa_store.cluster import Cut, Phase, Plan
from psa_store.consistency import Arrivals, Offer, Push
from psa_store.consistency.instructions import (
    Applied,
    ApplyPushes,
    Commit,
    Committed,
    Copied,
    Copy,
    CopyDelayed,
    Frozen,
    Instruction,
    Missed,
    Pinned,
    RankCut,
    Revised,
    Stopped,
)

RANKS, STEPS, INTERVAL, STALENESS = 3, 6, 4, 2
OWNED = {"a": (0, 1), "b": (2,)}
"""Shards by server."""
MARK = -1
History = dict[int, list[tuple[int, int]]]
"""By shard, the pushes (rank, step) that are in it, in order."""


def one(clocks: list[int] | None = None, committed: int = 0, ahead_max: int | None = None) -> Arrivals:
    """One server with one shard."""
    return Arrivals({0: clocks or [0] * RANKS}, ahead_max=ahead_max, commit_interval=INTERVAL, committed=committed)


def apply_all(arrivals: Arrivals) -> list[tuple[int, int]]:
    """Do what can be done without copies; returns what was applied."""
    done = []
    while todo := arrivals.ready(may_copy=False):
        for instruction in todo:
            if isinstance(instruction, ApplyPushes):
                arrivals.handle(Applied())
                done += [(each.rank, each.step) for each in instruction.pushes]
    return done


def copy(arrivals: Arrivals) -> Copy:
    """Copy what waits for it."""
    (instruction,) = arrivals.ready()
    assert isinstance(instruction, Copy)
    arrivals.handle(Copied())
    return instruction


def plan(**changes: object) -> Plan:
    fields = {"term": 3, "revision": 1, "resume": 0, "servers": (), "owners": (), "cells": ("w",) * RANKS, **changes}
    return Plan(**fields)  # type: ignore[arg-type]


def test_pushes_of_a_rank_are_taken_once_and_in_order() -> None:
    arrivals = one()
    assert arrivals.offer(1, 0, 0) is Offer.AHEAD
    assert arrivals.offer(0, 0, 0) is Offer.NEW
    assert arrivals.accept(0, 0, 0)
    assert arrivals.offer(0, 0, 0) is Offer.DUPLICATE, "it waits already"
    assert not arrivals.accept(0, 0, 0)
    assert arrivals.offer(1, 0, 0) is Offer.AHEAD, "the one before it is not applied yet"
    assert apply_all(arrivals) == [(0, 0)]
    assert arrivals.offer(0, 0, 0) is Offer.DUPLICATE
    assert arrivals.offer(1, 0, 0) is Offer.NEW


def test_a_shard_stands_still_at_a_commit_until_it_is_copied() -> None:
    arrivals = one([1, 1, 1], committed=0)
    for rank in range(RANKS):
        arrivals.accept(1, 0, rank)
    assert apply_all(arrivals) == [(0, 1)], "version 4 is to be committed"
    assert copy(arrivals) == Copy(4, [0])
    assert arrivals.ready(may_copy=False)[0] == Commit(4, None)
    arrivals.handle(Applied())
    assert apply_all(arrivals) == [(2, 1)] and arrivals.version_of(0) == 6
    assert arrivals.commits_next == 8


def test_a_limit_stops_even_what_is_copied() -> None:
    arrivals = one([1, 1, 1])
    arrivals.handle(Revised(plan(phase=Phase.STOP, stop_version=3)))
    arrivals.accept(1, 0, 0)
    assert apply_all(arrivals) == []
    assert copy(arrivals) == Copy(3, [0])
    assert apply_all(arrivals) == []
    arrivals.handle(Committed(3))
    assert arrivals.ready() == [Stopped(3)]
    assert arrivals.ready() == [], "once is enough"
    arrivals.handle(Revised(plan(revision=2)))
    assert apply_all(arrivals) == [(0, 1)]


def test_a_commit_that_is_asked_for_too_late_holds_no_rank_up() -> None:
    arrivals = one([2, 1, 0])
    assert arrivals.ready(awaited={2}) == [] and arrivals.commits_next == INTERVAL
    assert arrivals.ready(awaited={3}) == [Copy(3, [0])]


def test_while_copies_are_written_other_shards_go_on() -> None:
    arrivals = Arrivals({0: [1, 1, 1], 1: [1, 0, 0]}, ahead_max=None, commit_interval=3, committed=0)
    arrivals.accept(0, 1, 1)
    assert arrivals.ready() == [Copy(3, [0])]
    assert arrivals.ready() == [], "one thing at a time"
    arrivals.handle(CopyDelayed())
    assert arrivals.ready(may_copy=False) == [ApplyPushes([Push(1, 1, 0)])]
    assert arrivals.stands_at is None
    arrivals.handle(Applied())
    assert arrivals.ready() == [Copy(3, [0])]


def test_a_frozen_server_says_how_far_its_shards_are_and_applies_nothing() -> None:
    arrivals = Arrivals({0: [1, 1, 1], 1: [1, 0, 0]}, ahead_max=None, commit_interval=9, committed=0)
    arrivals.handle(Revised(plan(phase=Phase.FREEZE, freeze_revision=5)))
    arrivals.accept(0, 1, 1)
    assert arrivals.ready() == [Frozen(5, 1, 3)]
    assert arrivals.ready() == []


def test_a_server_whose_shards_never_change_is_where_the_plan_wants_it() -> None:
    arrivals = Arrivals({}, ahead_max=None, commit_interval=INTERVAL, committed=8)
    cut = Cut("c", "1")
    arrivals.handle(Revised(plan(resume=8, cut=cut)))
    assert arrivals.ready() == [Pinned(3, cut, 8)]
    arrivals.handle(Revised(plan(revision=2, phase=Phase.STOP, stop_version=11)))
    assert arrivals.ready() == [Stopped(11)] and arrivals.may_start(5, 0)


@pytest.mark.parametrize(("ahead_max", "may"), [(None, True), (2, True), (1, False)])
def test_a_rank_may_be_ahead_by_the_bound_and_no_more(ahead_max: int | None, may: bool) -> None:
    arrivals = one([2, 0, 1], ahead_max=ahead_max)
    assert arrivals.may_start(2, 0) is may
    assert arrivals.may_start(0, 1), "the slowest may always start"
    assert not arrivals.may_start(3, 0), "its own push is not in yet"


@given(st.lists(st.tuples(st.integers(0, RANKS - 1), st.booleans()), max_size=60))
def test_what_is_applied_is_what_the_clocks_say(actions: list[tuple[int, bool]]) -> None:
    arrivals = one()
    history: list[tuple[int, int]] = []
    for rank, works in actions:
        step = sum(1 for r, _ in history if r == rank)
        if arrivals.offer(step, 0, rank) is Offer.NEW:
            arrivals.accept(step, 0, rank)
        if works:
            history += apply_all(arrivals)
            if arrivals.version == arrivals.commits_next:
                assert copy(arrivals) == Copy(arrivals.version, [0])
        assert arrivals.version == len(history)
        assert arrivals.clocks() == [sum(1 for r, _ in history if r == each) for each in range(RANKS)]


class Rank:
    """Which worker computes it now, what it keeps, and what is on its way to each server."""

    def __init__(self, inherited: int = 0) -> None:
        self.next = 0
        self.inherited = inherited
        """So many pushes others may have made of it, of which the servers may have some: they are computed again."""
        self.kept: deque[int] = deque()
        self.on_its_way: dict[str, deque[tuple[int, int]]] = {server: deque() for server in OWNED}
        """Step and shard of pushes; MARK instead of a shard: the cut ends with so many."""
        self.cut: int | None = None

    def push(self, step: int) -> None:
        for server, shards in OWNED.items():
            self.on_its_way[server].extend((step, shard) for shard in shards)

    def mark(self) -> None:
        """Where the cut is: in the same place on every connection."""
        self.cut = self.next if self.cut is None else self.cut
        for queue in self.on_its_way.values():
            queue.append((self.cut, MARK))

    def hang_up(self) -> None:
        for queue in self.on_its_way.values():
            queue.clear()


class Job(RuleBasedStateMachine):
    """Two servers and three ranks: what both do with connections, leaders and commits, in a few lines."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = [Rank() for _ in range(RANKS)]
        self.history: History = {shard: [] for shards in OWNED.values() for shard in shards}
        self.copies: dict[str, dict[int, History]] = {server: {} for server in OWNED}
        self.committed: dict[str, dict[int, History]] = {
            server: {0: {shard: [] for shard in shards}} for server, shards in OWNED.items()
        }
        self.cut: dict[str, History] | None = None
        """By server, what it has copied for the checkpoint that is being taken; None: none is."""
        self.barriers = 0
        self.checkpoints = 0
        self.begin(0)

    def begin(self, version: int) -> None:
        """A term begins with what all shards have committed."""
        for server in OWNED:
            self.history.update({s: list(pushes) for s, pushes in self.committed[server][version].items()})
            self.committed[server] = {v: c for v, c in self.committed[server].items() if v <= version}
            self.copies[server] = {}
        self.arrivals = {
            server: Arrivals(
                {shard: [self.count(shard, rank) for rank in range(RANKS)] for shard in shards},
                ahead_max=STALENESS,
                commit_interval=INTERVAL,
                committed=version,
            )
            for server, shards in OWNED.items()
        }
        self.cut_ends()

    def cut_ends(self) -> None:
        """It is taken, or aborted: all servers are told, and all workers."""
        self.cut = None
        for each in self.arrivals.values():
            each.handle(Revised(plan()))
        for worker in self.ranks:
            worker.cut = None
            for server, queue in worker.on_its_way.items():
                worker.on_its_way[server] = deque(each for each in queue if each[1] != MARK)

    def count(self, shard: int, rank: int) -> int:
        return sum(1 for r, _ in self.history[shard] if r == rank)

    def applied_everywhere(self, rank: int) -> int:
        return min(self.count(shard, rank) for shard in self.history)

    def newest_common(self) -> int:
        return max(set.intersection(*(set(each) for each in self.committed.values())))

    # --- what happens

    @rule(rank=st.integers(0, RANKS - 1))
    def a_rank_computes(self, rank: int) -> None:
        worker = self.ranks[rank]
        step = worker.next
        if step == STEPS or not all(each.may_start(step, rank) for each in self.arrivals.values()):
            return
        slowest = min(self.applied_everywhere(each) for each in range(RANKS))
        assert step - slowest <= STALENESS
        # Beyond it where a rank's holder died with pushes that waited at the servers: the next one computes these steps
        # a second time, and its pushes are duplicates.
        assert self.applied_everywhere(rank) >= step, "it would not see its own push"
        worker.kept.append(step)
        worker.push(step)
        worker.next += 1

    @rule(server=st.sampled_from(sorted(OWNED)), rank=st.integers(0, RANKS - 1))
    def something_arrives(self, server: str, rank: int) -> None:
        queue, arrivals = self.ranks[rank].on_its_way[server], self.arrivals[server]
        if not queue:
            return
        step, shard = queue[0]
        if shard == MARK:
            queue.popleft()
            if self.cut is not None:
                arrivals.handle(RankCut(self.barriers, rank, step))
            if self.cut is not None and server not in self.cut:
                missed = any(self.count(shard, rank) > step for shard in OWNED[server])
                assert not missed or step < self.ranks[rank].inherited, "a mark came later than a push behind it"
                if missed:
                    todo = arrivals.ready(may_copy=False)
                    assert isinstance(todo.pop(0), Missed)
                    self.cut_ends()  # it is aborted, and tried again
                    self.a_checkpoint_begins()
                    self.carry_out(server, todo)
            return
        offer = arrivals.offer(step, shard, rank)
        if offer is Offer.AHEAD:
            return  # it waits at the door
        queue.popleft()
        if offer is Offer.NEW:
            arrivals.accept(step, shard, rank)

    @rule(server=st.sampled_from(sorted(OWNED)))
    def a_server_applies(self, server: str) -> None:
        self.carry_out(server, self.arrivals[server].ready(awaited={STEPS * RANKS}, may_copy=False))

    @rule(server=st.sampled_from(sorted(OWNED)))
    def a_server_goes_on(self, server: str) -> None:
        self.carry_out(server, self.arrivals[server].ready(awaited={STEPS * RANKS}))

    def carry_out(self, server: str, todo: list[Instruction]) -> None:
        arrivals = self.arrivals[server]
        for instruction in todo:
            match instruction:
                case ApplyPushes():
                    for push in instruction.pushes:
                        self.history[push.shard].append((push.rank, push.step))
                    arrivals.handle(Applied())
                case Copy():
                    copies = self.copies[server].setdefault(instruction.version, {})
                    copies.update({shard: list(self.history[shard]) for shard in instruction.shards})
                    arrivals.handle(Copied())
                case Commit():
                    self.commit(server, instruction)
                case _:
                    raise AssertionError(instruction)

    def commit(self, server: str, commit: Commit) -> None:
        copies = self.copies[server][commit.version]
        assert copies.keys() == set(OWNED[server])
        assert all(len(pushes) == commit.version for pushes in copies.values())
        self.committed[server][commit.version] = copies
        self.arrivals[server].handle(Committed(commit.version))
        self.drop_durable()
        if commit.pin is not None and self.cut is not None and int(commit.pin.barrier) == self.barriers:
            self.cut[server] = copies
            self.see_whether_the_cut_is_whole()

    def see_whether_the_cut_is_whole(self) -> None:
        assert self.cut is not None
        if len(self.cut) == len(OWNED):
            in_it = {
                tuple(self.count_in(pushes, rank) for rank in range(RANKS))
                for copy in self.cut.values()
                for pushes in copy.values()
            }
            assert in_it == {tuple(worker.cut for worker in self.ranks)}, "shards of a checkpoint hold unlike pushes"
            self.checkpoints += 1
            self.cut_ends()

    @rule()
    def a_checkpoint_begins(self) -> None:
        if self.cut is None:
            self.cut = {}
            self.barriers += 1
            for each in self.arrivals.values():
                each.handle(Revised(plan(cut=Cut("c", str(self.barriers)))))

    @rule(rank=st.integers(0, RANKS - 1))
    def a_rank_marks(self, rank: int) -> None:
        if self.cut is not None and self.ranks[rank].cut is None:
            self.ranks[rank].mark()

    def drop_durable(self) -> None:
        common = self.newest_common()
        for rank, worker in enumerate(self.ranks):
            shards = [pushes for each in self.committed.values() for pushes in each[common].values()]
            durable = min(sum(1 for r, _ in pushes if r == rank) for pushes in shards)
            while worker.kept and worker.kept[0] < durable:
                worker.kept.popleft()

    @rule()
    def a_server_dies(self) -> None:
        self.begin(self.newest_common())
        for rank, worker in enumerate(self.ranks):
            worker.hang_up()
            start = self.applied_everywhere(rank)
            whole = start == worker.next or (bool(worker.kept) and worker.kept[0] <= start < worker.next)
            if not whole:
                worker.kept.clear()
                worker.inherited = max(worker.inherited, worker.next)
                worker.next = start
            for step in worker.kept:
                if step >= start:
                    worker.push(step)

    @rule(rank=st.integers(0, RANKS - 1))
    def a_connection_breaks(self, rank: int) -> None:
        """The worker comes back and pushes again what the servers lack, and one push more, to be sure."""
        worker = self.ranks[rank]
        worker.hang_up()
        if worker.cut is not None:
            worker.mark()
        start = self.applied_everywhere(rank)
        for step in worker.kept:
            if step >= start - 1:
                worker.push(step)

    @rule(rank=st.integers(0, RANKS - 1))
    def a_worker_dies(self, rank: int) -> None:
        dead = self.ranks[rank]
        worker = self.ranks[rank] = Rank(max(dead.inherited, dead.next))
        worker.next = self.applied_everywhere(rank)
        self.cut_ends()

    # --- what must hold

    @invariant()
    def each_push_counts_once_and_in_order(self) -> None:
        for pushes in self.history.values():
            for rank in range(RANKS):
                assert [step for r, step in pushes if r == rank] == list(range(self.count_in(pushes, rank))), (
                    "a push was lost, or counted twice"
                )

    @staticmethod
    def count_in(pushes: list[tuple[int, int]], rank: int) -> int:
        return sum(1 for r, _ in pushes if r == rank)

    @invariant()
    def what_was_acknowledged_is_committed(self) -> None:
        common = self.newest_common()
        for rank, worker in enumerate(self.ranks):
            first_kept = worker.kept[0] if worker.kept else worker.next
            shards = [pushes for each in self.committed.values() for pushes in each[common].values()]
            durable = min(self.count_in(pushes, rank) for pushes in shards)
            assert first_kept >= durable or worker.next <= first_kept

    def teardown(self) -> None:
        """Left in peace, the job ends, with everything committed."""
        work: list[Callable[[], None]] = []
        for rank in range(RANKS):
            work.append(lambda rank=rank: self.a_rank_marks(rank))
            work.append(lambda rank=rank: self.a_rank_computes(rank))
            work += [lambda rank=rank, server=server: self.something_arrives(server, rank) for server in OWNED] * 3
        for server in OWNED:
            work.append(lambda server=server: self.a_server_applies(server))
            work.append(lambda server=server: self.a_server_goes_on(server))
        for _ in range(40 * STEPS):
            for each in work:
                each()
        assert self.newest_common() == STEPS * RANKS, "the job stands still"
        assert self.cut is None, "a checkpoint was never taken"


def test_a_cut_that_misses_what_a_dead_worker_pushed_is_tried_again() -> None:
    """Found by the properties: the next holder of a rank stands before a push that one of two servers has."""
    job = Job()
    job.a_rank_computes(0)
    job.something_arrives("a", 0)
    job.a_server_applies("a")
    job.a_worker_dies(0)
    job.a_checkpoint_begins()
    job.a_rank_marks(0)
    cut = job.cut
    job.something_arrives("a", 0)
    assert job.cut is not cut, "the mark comes before what is in a shard, and was taken"
    job.teardown()
    assert job.checkpoints == 1


Job.TestCase.settings = settings(max_examples=60, stateful_step_count=80)
TestJob = Job.TestCase
