"""The controller's decisions: pure, so they are tested by walking them, with members dying at any point."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_store.cluster import (
    NO_WORKER,
    Cell,
    Member,
    Phase,
    Plan,
    Publish,
    TakeOver,
    View,
    assign_cells,
    assign_shards,
    believed,
    decide,
    member_from_json,
    newest_common,
    plan_from_json,
)
from psa_store.errors import DataIntegrity
from psa_store.job.document import Damaged

names = st.sampled_from("abcdefgh")


def member(name: str, **changes: object) -> Member:
    return replace(Member(name, "host", 1, address=f"127.0.0.1:{ord(name)}", local=name), **changes)  # type: ignore[arg-type]


def members(*listed: str) -> dict[str, Member]:
    return {name: member(name) for name in listed}


@given(current=st.lists(names | st.just(NO_WORKER), min_size=1, max_size=20), alive=st.sets(names))
def test_ranks_are_shared_evenly_among_the_living(current: list[str], alive: set[str]) -> None:
    ranks = assign_cells(current, alive)
    assert len(ranks) == len(current)
    if not alive:
        assert set(ranks) == {NO_WORKER}
        return
    counts = [ranks.count(name) for name in alive]
    assert sum(counts) == len(current)
    assert max(counts) - min(counts) <= 1


@given(ranks=st.integers(1, 20), alive=st.sets(names, min_size=1), dead=names)
def test_a_death_moves_only_what_must_move(ranks: int, alive: set[str], dead: str) -> None:
    before = assign_cells([NO_WORKER] * ranks, alive | {dead})
    after = assign_cells(before, alive - {dead} or {"z"})
    if alive - {dead}:
        assert all(b == a for b, a in zip(before, after, strict=True) if b != dead)


@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=30), count=st.integers(1, 8))
def test_shards_go_in_runs_and_all_have_an_owner(sizes: list[int], count: int) -> None:
    servers, owners = assign_shards(sizes, [member(name) for name in "abcdefgh"[:count]])
    assert len(owners) == len(sizes)
    assert list(owners) == sorted(owners)
    assert set(owners) == set(range(len(servers)))


@given(count=st.integers(1, 8))
def test_equal_shards_are_balanced(count: int) -> None:
    _, owners = assign_shards([1] * 64, [member(name) for name in "abcdefgh"[:count]])
    loads = [owners.count(index) for index in range(count)]
    assert max(loads) - min(loads) <= 1


def test_plans_and_members_survive_json() -> None:
    servers, owners = assign_shards([1] * 7, [member("a"), member("b")])
    plan = Plan(3, 9, 40, servers, owners, ("w", NO_WORKER), Phase.STOP, 41)
    assert plan_from_json(plan.to_json()) == plan
    assert member_from_json(member("a", leaving=True).to_json()) == member("a", leaving=True)


BEFORE_STAGES = """{
 "format": 2, "term": 3, "revision": 9, "resume": 40,
 "servers": [{"id": "s", "address": "h:1", "local": "l", "host": "h"}],
 "owners": [[0, 3]], "ranks": ["v", "w"],
 "phase": "stop", "freeze_revision": null, "stop_version": 41, "cut": null
}"""
"""As the release before stages wrote it."""


def test_a_plan_of_the_format_before_stages_is_read_as_one_of_a_single_stage() -> None:
    plan = plan_from_json(BEFORE_STAGES)
    assert (plan.term, plan.owners, plan.phase, plan.stop_version) == (3, (0, 0, 0), Phase.STOP, 41)
    assert (plan.cells, plan.stages, plan.ranks) == (("v", "w"), 1, 2)
    assert plan.holder(1) == "w" and plan.ranks_of("w") == (1,) and plan.cells_of("w") == (Cell(1),)
    assert plan_from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["format"] == 3


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", BEFORE_STAGES.replace('"ranks"', '"cells"'), BEFORE_STAGES.replace("2,", "1,", 1)]
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(DataIntegrity, match="the plan in ZooKeeper"):
        plan_from_json(text)


@st.composite
def staged_plans(draw: st.DrawFn) -> Plan:
    ranks, stages = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    cells = draw(st.lists(names | st.just(NO_WORKER), min_size=ranks * stages, max_size=ranks * stages))
    return Plan(1, 1, 0, (), (), tuple(cells), stages=stages)


@given(staged_plans())
def test_each_cell_has_one_holder_and_each_worker_its_cells_in_their_order(plan: Plan) -> None:
    assert plan_from_json(plan.to_json()) == plan
    every = [Cell(rank, stage) for rank in range(plan.ranks) for stage in range(plan.stages)]
    assert sorted(cell for worker in set(plan.cells) for cell in plan.cells_of(worker)) == every
    for worker in set(plan.cells):
        cells = plan.cells_of(worker)
        assert list(cells) == [cell for cell in every if plan.holder(cell.rank, cell.stage) == worker]
        assert plan.ranks_of(worker) == tuple(sorted({cell.rank for cell in cells}))
    assert plan.begun_again(2, 7).stages == plan.stages
    assert plan.cells_of("a stranger") == plan.ranks_of("a stranger") == ()


@given(ranks=st.integers(1, 8), stages=st.integers(1, 6), alive=st.sets(names, min_size=1))
def test_at_a_fresh_start_neighbours_stay_together(ranks: int, stages: int, alive: set[str]) -> None:
    """A worker has a run of cells, so it needs as few stages as its share of the cells allows."""
    cells = assign_cells([NO_WORKER] * (ranks * stages), alive)
    runs = [holder for holder, _ in groupby(cells)]
    assert len(runs) == len(set(runs)) == min(len(alive), len(cells))
    plan = Plan(1, 1, 0, (), (), cells, stages=stages)
    for worker in runs:
        count = len(plan.cells_of(worker))
        assert len({cell.stage for cell in plan.cells_of(worker)}) <= (count + ranks - 2) // ranks + 1


@given(current=st.lists(names, min_size=1, max_size=24), alive=st.sets(names, min_size=1))
def test_a_worker_keeps_its_cells_up_to_an_even_share(current: list[str], alive: set[str]) -> None:
    cells = assign_cells(current, alive)
    share = len(current) // len(alive)
    for worker in alive:
        kept = sum(before == after == worker for before, after in zip(current, cells, strict=True))
        assert kept >= min(current.count(worker), share)


def test_the_cells_of_a_job_in_stages_are_given_out_with_the_first_plan_and_with_every_one_after() -> None:
    cluster = Cluster(stages=3)
    cluster.servers, cluster.workers = members("a"), members("v", "w")
    action = decide(cluster.view())
    assert isinstance(action, TakeOver) and action.stages == 3
    assert action.cells == ("v",) * 6 + ("w",) * 6
    cluster.settle()
    del cluster.workers["v"]
    cluster.settle()
    assert cluster.plan is not None and (cluster.plan.stages, cluster.plan.ranks) == (3, 4)
    assert cluster.plan.cells == ("w",) * 12 and cluster.terms == [1], "the owners of shards stay"


def test_a_worker_that_comes_back_gets_its_cell_between_two_steps_and_a_dead_one_s_goes_at_once() -> None:
    cluster = Cluster(stages=2)
    cluster.servers, cluster.workers = members("a"), members("v", "w")
    cluster.settle()
    cluster.version = 17
    del cluster.workers["w"]
    cluster.settle()
    assert cluster.plan is not None and cluster.plan.cells_at(17) == ("v",) * 8
    cluster.workers["x"] = member("x")
    cluster.settle()
    plan = cluster.plan
    assert plan.cells_at(17) == plan.cells_at(18) == ("v",) * 8 and plan.cells_at(19) == ("v",) * 4 + ("x",) * 4
    assert plan.holder(0, 1, 18) == "v" and plan.holder(0, 1, 19) == plan.holder(0, 1) == "x"
    assert plan.cells_of("x", 18) == () and plan.ranks_of("x") == (0, 1, 2, 3)
    del cluster.workers["v"]
    cluster.settle()
    assert cluster.plan.cells_at(17) == ("x",) * 8, "no living worker has what would have gone later"


def test_where_workers_gather_each_gets_its_cells_at_once() -> None:
    """They may have memory for those only."""
    cluster = Cluster(stages=4)
    cluster.servers = members("a")
    for name in "vwxy":
        cluster.workers[name] = member(name)
        cluster.settle()
    assert cluster.plan is not None and cluster.plan.cells_at(0) == cluster.plan.cells
    assert all(len(cluster.plan.cells_of(name, 0)) == 4 for name in "vwxy")


def test_a_move_that_was_made_is_none_any_more_for_the_next_one() -> None:
    cluster = Cluster(stages=2)
    cluster.servers, cluster.workers = members("a"), members("v")
    for version, joins in ((5, "w"), (90, "x")):
        cluster.settle()
        cluster.version = version
        cluster.workers[joins] = member(joins)
    before = cluster.plan
    cluster.settle()
    assert before is not None and cluster.plan is not None
    assert cluster.plan.cells_at(91) == before.cells and cluster.plan.moved_at == 92
    begun = cluster.plan.begun_again(2, 50)
    assert begun.cells_at(50) == cluster.plan.cells, "in a new term all is given out at once"


@pytest.mark.parametrize("before", [(7, ["v"]), (7, ["v", "x"]), (0, ["v", "v"]), (7, [])])
def test_a_plan_with_a_move_that_cannot_be_is_refused(before: tuple[int, list[str]]) -> None:
    plan = Plan(1, 1, 0, (), (), ("v", "w"), stages=2)
    changed = json.loads(plan.to_json()) | dict(zip(("moved_at", "cells_before"), before, strict=True))
    with pytest.raises(DataIntegrity, match="the plan in ZooKeeper"):
        plan_from_json(json.dumps(changed))


DAMAGE = Damaged("/psa/job/plan", "it cannot be read")


def test_a_damaged_plan_begins_a_term_above_everything_that_a_member_may_have_spoken_of() -> None:
    cluster = Cluster()
    cluster.servers, cluster.workers = members("a", "b"), members("v", "w")
    cluster.settle()
    last = cluster.plan
    assert last is not None
    cluster.servers["b"] = replace(cluster.servers["b"], frozen_revision=last.revision + 5)
    action = decide(replace(cluster.view(), plan=None, damage=DAMAGE, last=last))
    assert isinstance(action, TakeOver) and DAMAGE.why in action.reason
    assert (action.servers, action.owners, action.cells) == (last.servers, last.owners, last.cells), "nothing moves"
    assert action.above == (last.term, last.revision + 5)


def test_a_damaged_plan_is_written_again_also_where_all_servers_leave() -> None:
    view = View(None, {"a": member("a", leaving=True)}, members("w"), (4, 4), ranks=2, damage=DAMAGE)
    assert isinstance(decide(view), TakeOver)


def test_members_that_cannot_be_read_stay_if_the_plan_names_them_and_get_nothing_if_it_does_not() -> None:
    servers, owners = assign_shards([1] * 4, [member("a"), member("b")])
    plan = Plan(1, 1, 0, servers, owners, ("w", "v"))
    damaged, left = Damaged("/psa/job/workers/w", "garbage"), Damaged("/psa/job/workers/v", "garbage", kept=False)
    found = {"a": member("a", leaving=True), "b": damaged, "c": damaged}
    assert believed(found, plan) == {"a": member("a", leaving=True), "b": replace(member("b"), host="host", pid=0)}
    assert believed({"w": damaged, "x": damaged, "v": left}, plan).keys() == {"w"}
    assert believed(found, None).keys() == {"a"}


@given(
    text=st.text(max_size=40)
    | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    ).map(json.dumps)
)
def test_whatever_stands_in_a_znode_is_a_document_or_refused(text: str) -> None:
    for read in (plan_from_json, member_from_json):
        with suppress(DataIntegrity):
            read(text)


FIELDS = st.sampled_from(
    ["term", "revision", "resume", "owners", "cells", "servers", "stages", "phase", "cut", "format"]
)
VALUES = st.sampled_from(
    [None, -1, 0, 1, 99, 10**30, 1e300, "", "x", [], [[0, 10**12]], [[0, 10**12], [0, -(10**12)]]]
) | st.lists(st.lists(st.integers(-3, 3), max_size=3), max_size=3)


@given(changes=st.dictionaries(FIELDS, VALUES, min_size=1))
def test_a_plan_that_is_read_can_be_followed_whatever_was_changed_in_it(changes: dict[str, object]) -> None:
    servers, owners = assign_shards([1] * 4, [member("a"), member("b")])
    text = Plan(1, 1, 0, servers, owners, ("w", "v")).to_json()
    try:
        plan = plan_from_json(json.dumps(json.loads(text) | changes))
    except DataIntegrity:
        return
    assert 0 <= plan.term < 1 << 53 and len(plan.owners) < 1 << 21
    for shard in range(len(plan.owners)):
        assert plan.owner_of(shard) in plan.servers
    for rank in range(plan.ranks):
        for stage in range(plan.stages):
            assert plan.holder(rank, stage) in plan.cells


@given(st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 9))))
def test_newest_common_is_common_and_newest(versions: dict[int, set[int]]) -> None:
    common = newest_common(versions)
    everywhere = [v for v in range(10) if versions and all(v in has for has in versions.values())]
    assert common == (max(everywhere) if everywhere else None)


class Cluster:
    """Carries decisions out as a controller, obedient servers and a job that goes on would.

    ``interval``: with rank state, the versions between two commits of it.
    """

    def __init__(self, interval: int = 0, stages: int = 1) -> None:
        self.interval, self.stages = interval, stages
        self.plan: Plan | None = None
        self.servers: dict[str, Member] = {}
        self.workers: dict[str, Member] = {}
        self.version = 0
        self.terms: list[int] = []

    def view(self) -> View:
        return View(
            self.plan,
            dict(self.servers),
            dict(self.workers),
            (4, 4, 4, 4, 4, 4),
            ranks=4,
            stages=self.stages,
            stop_interval=self.interval,
            version=self.version,
        )

    def decide_once(self) -> bool:
        action = decide(self.view())
        if action is None:
            return False
        if isinstance(action, TakeOver):
            term = (self.plan.term if self.plan else 0) + 1
            revision = (self.plan.revision if self.plan else 0) + 1
            self.terms.append(term)
            if self.interval:
                self.version -= self.version % self.interval
            self.plan = Plan(
                term, revision, self.version, action.servers, action.owners, action.cells, stages=action.stages
            )
        else:
            assert isinstance(action, Publish)
            assert self.plan is not None and action.plan.term == self.plan.term
            assert action.plan.revision == self.plan.revision + 1
            if action.plan.owners:
                assert action.plan.owners == self.plan.owners, "ownership changed without a new term"
            if self.interval and action.plan.owners:
                assert action.plan.cells == self.plan.cells, "rank state changed hands without a new term"
                assert action.plan.phase is not Phase.STOP or (action.plan.stop_version or 0) % self.interval == 0
            if action.plan.owners and self.workers:
                self.check_moves(self.plan, action.plan)
            self.plan = action.plan
        return True

    def check_moves(self, before: Plan, after: Plan) -> None:
        """A cell of a dead worker is computed by a living one at once; one of a living worker stays where it is in this
        step and the next one."""
        assert plan_from_json(after.to_json()) == after
        now, later = (after.cells_at(self.version + ahead) for ahead in (0, 1))
        for old, *new in zip(before.cells_at(self.version), now, later, strict=True):
            if old in self.workers and self.stages > 1 and self.version > after.resume:
                assert new == [old, old]
            elif not self.interval:
                assert set(new) <= self.workers.keys()
        assert (self.stages > 1 and self.version > after.resume) or after.cells_at(self.version) == after.cells

    def servers_follow(self) -> None:
        plan = self.plan
        if plan is None:
            return
        for server in plan.servers:
            if server.id in self.servers:
                now = self.servers[server.id]
                if plan.phase is Phase.FREEZE:
                    now = replace(
                        now,
                        frozen_revision=plan.freeze_revision,
                        frozen_newest=self.version,
                        frozen_version=self.version,
                    )
                if plan.phase is Phase.STOP and self.workers:
                    self.version = max(self.version, plan.stop_version or 0)
                if plan.stop_version is not None and self.version >= plan.stop_version:
                    now = replace(now, stopped_version=plan.stop_version, frozen_version=self.version)
                self.servers[server.id] = now

    def settle(self) -> None:
        for _ in range(20):
            self.servers_follow()
            if not self.decide_once():
                return
        raise AssertionError("the controller does not come to rest")


events = st.lists(
    st.tuples(st.sampled_from(["join", "die", "leave", "worker", "worker dies", "look", "reload", "step"]), names),
    max_size=25,
)


@settings(max_examples=300)
@given(events=events, interval=st.sampled_from([0, 3]), stages=st.integers(1, 3))
def test_whatever_happens_the_cluster_settles_on_the_living(
    events: list[tuple[str, str]], interval: int, stages: int
) -> None:
    cluster = Cluster(interval, stages)
    for what, name in events:
        match what:
            case "join":
                cluster.servers.setdefault(name, member(name))
            case "die":
                cluster.servers.pop(name, None)
            case "leave" if name in cluster.servers:
                cluster.servers[name] = replace(cluster.servers[name], leaving=True)
            case "reload" if name in cluster.servers and cluster.plan is not None:
                cluster.servers[name] = replace(cluster.servers[name], reload_term=cluster.plan.term)
            case "worker":
                cluster.workers[name] = member(name)
            case "worker dies":
                cluster.workers.pop(name, None)
            case "step" if cluster.plan is not None and cluster.plan.phase is Phase.RUN and cluster.workers:
                cluster.version += 1
            case "look":
                cluster.servers_follow()
                cluster.decide_once()
            case _:
                pass
    cluster.settle()
    assert cluster.terms == sorted(set(cluster.terms))
    staying = {name for name, each in cluster.servers.items() if not each.leaving}
    if cluster.plan is None:
        assert not staying
        return
    owners = {server.id for server in cluster.plan.servers}
    assert cluster.plan.stages == stages and cluster.plan.ranks == 4
    if staying:
        assert owners <= staying and len(owners) == min(len(staying), 6)
        assert len(cluster.plan.owners) == 6
        assert cluster.plan.phase is Phase.RUN
        assert set(cluster.plan.cells) <= (set(cluster.workers) or {NO_WORKER})


def test_a_joining_server_is_given_shards_without_a_lost_step() -> None:
    cluster = Cluster()
    cluster.servers, cluster.workers = members("a"), members("w")
    cluster.settle()
    cluster.version = 17
    cluster.servers["b"] = member("b")
    phases = []
    while cluster.decide_once():
        assert cluster.plan is not None
        phases.append(cluster.plan.phase)
        cluster.servers_follow()
    assert phases == [Phase.FREEZE, Phase.STOP, Phase.RUN]
    assert cluster.plan is not None and cluster.plan.resume == 17


def test_a_joining_worker_waits_for_rank_state() -> None:
    cluster = Cluster(interval=10)
    cluster.servers, cluster.workers = members("a"), members("v")
    cluster.settle()
    cluster.version = 17
    cluster.workers["w"] = member("w")
    cluster.settle()
    assert cluster.plan is not None and cluster.plan.resume == 20
    assert sorted(cluster.plan.cells) == ["v", "v", "w", "w"]


def test_a_rank_whose_worker_died_goes_back_to_what_was_committed_of_it() -> None:
    cluster = Cluster(interval=10)
    cluster.servers, cluster.workers = members("a"), members("v", "w")
    cluster.settle()
    cluster.version = 17
    del cluster.workers["w"]
    action = decide(cluster.view())
    assert isinstance(action, TakeOver) and set(action.cells) == {"v"}


def test_no_process_waits_for_a_round_that_no_worker_computes() -> None:
    """Ctrl-C: the workers leave first, in the middle of what is committed together, and then all servers."""
    cluster = Cluster(interval=10)
    cluster.servers, cluster.workers = members("a", "b"), members("w")
    cluster.settle()
    cluster.version = 17
    cluster.workers.clear()
    cluster.servers_follow()
    cluster.decide_once()
    for name in "ab":
        cluster.servers[name] = replace(cluster.servers[name], leaving=True)
    cluster.settle()
    assert cluster.plan is not None and cluster.plan.owners == ()


def test_a_step_that_no_worker_can_finish_does_not_block_a_hand_over() -> None:
    cluster = Cluster()
    cluster.servers, cluster.workers = members("a", "b"), members("w")
    cluster.settle()
    cluster.servers["a"] = replace(cluster.servers["a"], leaving=True)
    cluster.decide_once()
    assert cluster.plan is not None
    revision = cluster.plan.freeze_revision
    for name, at in (("a", 7), ("b", 8)):
        cluster.servers[name] = replace(
            cluster.servers[name], frozen_revision=revision, frozen_newest=at, frozen_version=at
        )
    cluster.decide_once()
    assert cluster.plan.phase is Phase.STOP and cluster.plan.stop_version == 8
    cluster.workers.clear()
    assert isinstance(decide(cluster.view()), TakeOver)


def test_the_last_server_leaves_a_plan_from_which_the_next_one_starts() -> None:
    cluster = Cluster()
    cluster.servers, cluster.workers = members("a"), members("w")
    cluster.settle()
    cluster.version = 5
    cluster.servers["a"] = replace(cluster.servers["a"], leaving=True)
    cluster.settle()
    assert cluster.plan is not None and cluster.plan.owners == ()
    cluster.servers = members("b")
    cluster.settle()
    assert [server.id for server in cluster.plan.servers] == ["b"]
