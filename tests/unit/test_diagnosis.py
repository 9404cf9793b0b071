"""Each sickness is found, named with where it is and what looks further, and a job that is well has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from psa_store.cli.status_view import job_view
from psa_store.cluster import Cell, Member, Phase, Plan, ProcessRole, Server
from psa_store.coordination import ZooKeeperMember
from psa_store.job.config import JobConfig
from psa_store.job.document import from_text, to_fields, to_text
from psa_store.observe.formatting import cells, ranks
from psa_store.observe.heartbeat import Heartbeat
from psa_store.observe.status import Finding, JobStatus, Severity
from psa_store.observe.status.assemble import assemble
from psa_store.observe.status.schema import PATH, status_schema
from psa_store.observe.status.views import HeartbeatAge, RedisView, ServerAnswer, ZooKeeperView
from psa_store.storage import RedisFacts

NOW_S = 1_000_000.0
FACTS = RedisFacts(
    where="redis://db:6379",
    product="Redis 7.2.4",
    version="7.2.4",
    has_functions=True,
    has_scripts=True,
    is_replica=False,
    eviction="noeviction",
    memory_limit_bytes=1000,
    system_memory_bytes=0,
    used_memory_bytes=100,
    appends=True,
    appendfsync="everysec",
    save="",
    compresses=False,
    cannot_persist=False,
    round_trip_s=0.001,
    clock_ahead_s=0.0,
    run_id="0123456789",
)
SERVERS = tuple(Member(f"s{i}", f"node-{i}/boot", 100 + i, f"10.0.0.{i}:7000") for i in range(2))
WORKERS = tuple(Member(f"w{i}", f"node-{i}/boot", 200 + i) for i in range(2))
PLAN = Plan(3, 7, 50, tuple(Server(each.id, each.address, "", each.host) for each in SERVERS), (0, 0, 1), ("w0", "w1"))
CONFIG = JobConfig("demo", 2, 0, {"name": "sgd"}, "layout", commit_every=50)


def heartbeat(member: Member, role: ProcessRole, **changes: Any) -> Heartbeat:
    computes = role is ProcessRole.WORKER
    plain = Heartbeat(
        member=member.id,
        role=role,
        time=NOW_S - 0.5,
        host=member.host,
        pid=member.pid,
        endpoint=f"{member.host}:9400",
        resident_bytes=1 << 20,
        stage="computing" if computes else "collecting",
        shards=len(PLAN.shards_of(member.id)),
        ranks=PLAN.ranks_of(member.id),
        steps_per_s=10.0 if computes else None,
        samples_per_s=120.0 if computes else None,
        metrics={"step": 120, "loss": 1.5}
        if computes
        else {"version": 120, "committed_version": 100, "committed_time_seconds": NOW_S - 4.0},
    )
    return replace(plain, **changes)


HEARTBEATS: dict[str, Heartbeat] = {each.id: heartbeat(each, ProcessRole.SERVER) for each in SERVERS} | {
    each.id: heartbeat(each, ProcessRole.WORKER) for each in WORKERS
}
REDIS = RedisView(
    "redis://db:6379", facts=FACTS, config=CONFIG, shards=3, arena_bytes=300, committed=100, heartbeats=HEARTBEATS
)
ANSWER = ServerAnswer(120, 100, "collecting")
ZOOKEEPER = ZooKeeperView(
    "zk1:2181,zk2:2181",
    4.0,
    server="zk1:2181",
    latency_s=0.002,
    members=[ZooKeeperMember("zk1:2181", mode="leader"), ZooKeeperMember("zk2:2181", mode="follower")],
    config=CONFIG,
    plan=PLAN,
    plan_time_s=NOW_S - 100.0,
    servers=SERVERS,
    workers=WORKERS,
    controller="s0",
    answers={each.id: ANSWER for each in SERVERS},
)


def look(redis: RedisView = REDIS, zookeeper: ZooKeeperView = ZOOKEEPER) -> JobStatus:
    ages = {
        name: HeartbeatAge.after(None, each.time, 10.0, NOW_S)
        for name, each in redis.heartbeats.items()
        if each is not None
    }
    return assemble("demo", NOW_S, redis, zookeeper, ages, 10.0)


def findings(redis: RedisView = REDIS, zookeeper: ZooKeeperView = ZOOKEEPER) -> list[Finding]:
    return list(look(redis, zookeeper).findings)


def with_heartbeat(member: str, **changes: Any) -> RedisView:
    return replace(REDIS, heartbeats=HEARTBEATS | {member: replace(HEARTBEATS[member], **changes)})


def the_one(found: Sequence[Finding], severity: Severity, *parts: str) -> Finding:
    """The only finding, which must say all of these."""
    (finding,) = found
    said = f"{finding.what} [{finding.where}] {finding.look}"
    assert finding.severity is severity and all(part in said for part in parts), said
    return finding


def test_a_job_that_is_well() -> None:
    status = look()
    assert status.findings == () and status.state == "running"
    assert (status.version, status.committed, status.lag_steps, status.lag_s) == (120, 100, 20, 4.0)
    assert status.samples_per_s == 240.0 and status.loss == 1.5
    assert [each.behind for each in status.workers] == [0, 0]
    assert [each.heartbeat_age_s for each in status.servers] == [0.5, 0.5]
    json.dumps(to_fields(status), allow_nan=False)


def test_redis_away_hides_no_member() -> None:
    away = RedisView("redis://db:6379", problem="Redis at redis://db:6379 does not answer: refused")
    status = look(away)
    finding = the_one(list(status.findings), Severity.SICK, "does not answer", "redis://db:6379", "psa doctor demo")
    assert finding.member == ""
    assert [each.version for each in status.servers] == [120, 120] and status.shards == 3
    assert status.ranks == 2 and status.workers[0].ranks == (0,)


def test_without_zookeeper_members_are_known_by_their_heartbeats() -> None:
    away = ZooKeeperView("zk1:2181", 4.0, problem="ZooKeeper at zk1:2181 did not answer within 2 s")
    status = look(with_heartbeat("w1", time=NOW_S - 120.0), away)
    the_one(list(status.findings), Severity.SICK, "did not answer", "zk1:2181", "psa doctor demo")
    assert [(each.id, each.shards, each.lag) for each in status.servers] == [("s0", 2, 20), ("s1", 1, 20)]
    assert [(each.id, each.ranks) for each in status.workers] == [("w0", (0,))], "w1 is long silent"
    assert status.missing == () and status.committed == 100


def test_both_away() -> None:
    status = look(RedisView("redis://db", problem="away"), ZooKeeperView("zk1:2181", 4.0, problem="away"))
    assert [each.severity for each in status.findings] == [Severity.SICK, Severity.SICK]
    assert status.state == "not all is known"


def test_damage_in_redis() -> None:
    the_one(findings(replace(REDIS, damage="shard 3: cannot be read")), Severity.SICK, "shard 3", "psa doctor demo")


@pytest.mark.parametrize(
    ("change", "severity", "part"),
    [
        ({"cannot_persist": True}, Severity.SICK, "cannot write to its disk"),
        ({"used_memory_bytes": 901}, Severity.WARN, "nearly full"),
        ({"round_trip_s": 0.2}, Severity.WARN, "200 ms"),
    ],
)
def test_a_sick_redis(change: dict[str, Any], severity: Severity, part: str) -> None:
    sick = replace(REDIS, facts=replace(FACTS, **change))
    the_one(findings(sick), severity, part, "redis://db:6379", "psa doctor demo")


def test_a_slow_zookeeper() -> None:
    slow = replace(ZOOKEEPER, latency_s=0.11)
    the_one(findings(zookeeper=slow), Severity.WARN, "110 ms", "zk1:2181", "psa doctor demo")
    assert findings(zookeeper=replace(slow, session_timeout_s=10.0)) == []


def test_a_zookeeper_member_that_does_not_serve() -> None:
    members = [*ZOOKEEPER.members[:1], ZooKeeperMember("zk2:2181", "no connection: refused")]
    the_one(findings(zookeeper=replace(ZOOKEEPER, members=members)), Severity.WARN, "1 of 2", "[zk2:2181]")


def test_a_server_that_does_not_answer() -> None:
    silent = ServerAnswer(problem="timed out")
    found = findings(zookeeper=replace(ZOOKEEPER, answers={"s0": ANSWER, "s1": silent}))
    finding = the_one(found, Severity.SICK, "s1 does not answer: timed out", "[host node-1, pid 101]")
    assert finding.look == "on node-1: ps -o pid,stat,etime,args -p 101" and finding.member == "s1"


def test_a_server_that_answers_and_has_no_heartbeat_is_cut_off_from_redis() -> None:
    the_one(findings(with_heartbeat("s1", time=NOW_S - 9.0)), Severity.WARN, "s1 answers", "9 s", "pid 101")


def test_a_paused_worker() -> None:
    found = findings(with_heartbeat("w1", time=NOW_S - 3.1))
    the_one(found, Severity.SICK, "w1 holds rank 1", "paused", "on node-1: ps -o pid,stat,etime,args -p 201")
    assert findings(with_heartbeat("w1", time=NOW_S - 2.9)) == []


def test_a_paused_standby_worker_stops_no_step() -> None:
    standby = replace(ZOOKEEPER, workers=(*WORKERS, Member("w2", "node-2/boot", 202)))
    redis = replace(
        REDIS,
        heartbeats=HEARTBEATS | {"w2": heartbeat(Member("w2", "node-2", 202), ProcessRole.WORKER, time=NOW_S - 9.0)},
    )
    the_one(findings(redis, standby), Severity.WARN, "standby", "pid 202")


STANDING = {"steps_per_s": 0.0, "samples_per_s": 0.0}
WAITING = {"stage": "waiting", **STANDING}


def with_workers(first: dict[str, Any], second: dict[str, Any]) -> RedisView:
    changed = {"w0": replace(HEARTBEATS["w0"], **first), "w1": replace(HEARTBEATS["w1"], **second)}
    return replace(REDIS, heartbeats=HEARTBEATS | changed)


def test_a_worker_that_makes_no_steps_while_others_wait() -> None:
    stuck = with_workers(WAITING, STANDING)
    the_one(findings(stuck), Severity.SICK, "w1 (rank 1)", "step 120", "1 other wait", "-p 201")
    slow = with_workers(WAITING, STANDING | {"metrics": {"step": 120, "steps": 10.0, "compute_seconds": 300.0}})
    the_one(findings(slow), Severity.WARN, "w1 (rank 1)", "30 s for one")


def test_all_workers_wait_for_servers() -> None:
    redis = with_workers(WAITING, WAITING)
    the_one(findings(redis), Severity.SICK, "all workers wait", "psa status demo --watch")


STAGED = replace(CONFIG, ranks=1, stages=3, microbatches=4)
STAGES = tuple(Member(f"w{stage}", f"node-{stage}/boot", 200 + stage) for stage in range(3))


def in_stages(*changes: dict[str, Any], living: Sequence[Member] = STAGES, **plan: Any) -> tuple[RedisView, Any]:
    """A job of one rank, whose three stages are with a worker each; ``changes``: to the heartbeat of each."""
    cells = tuple(each.id for each in STAGES)
    staged = replace(PLAN, **{"cells": cells, "stages": 3, **plan})
    beats = {
        each.id: heartbeat(each, ProcessRole.WORKER, ranks=(0,), stages=3, cells=(Cell(0, stage),), **change)
        for stage, (each, change) in enumerate(zip(STAGES, changes or ({}, {}, {}), strict=True))
    }
    servers = {each.id: HEARTBEATS[each.id] for each in SERVERS}
    return (
        replace(REDIS, config=STAGED, heartbeats=servers | beats),
        replace(ZOOKEEPER, config=STAGED, plan=staged, workers=living),
    )


def waits(*stages: int, **changes: Any) -> dict[str, Any]:
    return {**WAITING, "waits_for": tuple(Cell(0, stage) for stage in stages), "waits_s": 9.0, **changes}


class TestStages:
    def test_a_worker_has_cells_and_the_loss_is_that_of_the_last_stage(self) -> None:
        without = {"metrics": {"step": 120, "loss": 9.0}, "samples_per_s": 0.0}
        status = look(*in_stages(without, without | {"waits_for": (Cell(0, 2),), "waits_s": 0.5}, {}))
        assert [each.cells for each in status.workers] == [(Cell(0, 0),), (Cell(0, 1),), (Cell(0, 2),)]
        assert [each.ranks for each in status.workers] == [(0,)] * 3
        assert [each.waits_for for each in status.workers] == [(), (Cell(0, 2),), ()]
        assert status.loss == 1.5, "others may have one from when they held that stage"
        assert [each.samples_per_s for each in status.workers] == [None, None, 120.0] and status.samples_per_s == 120.0
        assert (status.ranks, status.stages, status.microbatches) == (1, 3, 4)
        assert status.findings == () and status.unheld == ()
        assert from_text(JobStatus, to_text(status), "a status") == status

    def test_without_zookeeper_heartbeats_tell_the_cells(self) -> None:
        status = look(in_stages()[0], ZooKeeperView("zk1:2181", 4.0, problem="away"))
        assert [each.cells for each in status.workers] == [(Cell(0, 0),), (Cell(0, 1),), (Cell(0, 2),)]
        assert status.loss == 1.5

    def test_a_job_without_stages_is_written_as_before(self) -> None:
        written = to_fields(look(zookeeper=replace(ZOOKEEPER, workers=WORKERS[:1])))
        assert written["gone"] and written["unheld"] == [1]
        for fields in (written, *written["workers"], *written["gone"]):
            assert not fields.keys() & {"cells", "stages", "microbatches", "unheld_cells", "waits_for", "waits_s"}

    def test_the_stage_that_is_waited_for_is_the_slow_one(self) -> None:
        found = findings(*in_stages(waits(1), waits(2), STANDING))
        the_one(found, Severity.SICK, "w2 (stage 2 of rank 0)", "2 others wait, w1 for it", "-p 202")
        found = findings(*in_stages(waits(1), STANDING, STANDING))
        the_one(found, Severity.SICK, "w1 (stage 1 of rank 0)", "1 other wait, w0 for it")

    def test_a_step_of_many_stages_may_take_long(self) -> None:
        """Of 9 s a worker computes one, so that in the last seconds none may have made a step."""
        slow = {"metrics": {"step": 120, "steps": 10.0, "compute_seconds": 10.0, "wait_seconds": 80.0}}
        found = findings(*in_stages(waits(1, **slow), waits(2, **slow), STANDING | slow))
        the_one(found, Severity.WARN, "w2", "9 s for one")
        assert findings(*in_stages(*[waits(each, **slow) for each in (1, 2, 1)])) == [], "all may be on their way"

    def test_all_wait_for_each_other(self) -> None:
        found = findings(*in_stages(waits(1), waits(2), waits(1)))
        the_one(found, Severity.SICK, "all workers wait, w0 for stage 1 of rank 0, and no step is made", "--watch")
        assert findings(*in_stages(waits(1), waits(2), waits(1, waits_s=0.1))) == []

    def test_a_paused_worker_and_the_one_that_waits_for_it(self) -> None:
        found = findings(*in_stages(waits(1), {"time": NOW_S - 9.0}, waits(1)))
        the_one(found, Severity.SICK, "w1 holds stage 1 of rank 0", "paused or cut off; w0, w2 wait for it")

    def test_a_worker_gone_leaves_cells_without_holder(self) -> None:
        status = look(*in_stages(living=STAGES[:2]))
        assert [each.severity for each in status.findings] == [Severity.SICK, Severity.WARN]
        assert "stage 2 of rank 0 without a worker" in status.findings[0].what
        assert "worker w2 is gone; its stage 2 of rank 0 will go to others" in status.findings[1].what
        assert status.unheld == (0,) and status.unheld_cells == status.gone[0].cells == (Cell(0, 2),)

    def test_they_are_shown(self) -> None:
        console = Console(width=160, file=StringIO(), record=True)
        console.print(job_view(look(*in_stages(waits(1), {}, waits(1, waits_s=0.1))), 160))
        shown = console.export_text()
        assert "mode sync, 1 ranks, 3 stages, 4 micro-batches, 3 shards" in shown
        rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith(" w")}
        assert "stage 0 of rank 0" in rows["w0"] and "waits for stage 1 of rank 0, 9.0 s" in rows["w0"]
        assert "stage 1 of rank 0" in rows["w1"] and "computing" in rows["w1"]
        assert "waits for stage 1 of rank 0" in rows["w2"] and "0.1 s" not in rows["w2"]


def test_cells_are_written_by_stage() -> None:
    assert cells([]) == ""
    assert cells([Cell(1, 2)]) == "stage 2 of rank 1"
    assert cells(Cell(rank, 1) for rank in range(4)) == "stage 1 of ranks 0-3"
    assert cells(Cell(rank, stage) for rank in (0, 1) for stage in range(3)) == "stages 0-2 of ranks 0, 1"
    assert cells([Cell(0, 1), Cell(3, 0)]) == "stage 0 of rank 3 and stage 1 of rank 0"


def test_a_server_gone() -> None:
    status = look(zookeeper=replace(ZOOKEEPER, servers=SERVERS[:1]))
    finding = the_one(list(status.findings), Severity.SICK, "server s1 is gone with 1 shard", "another", "[node-1]")
    assert finding.look == "psa status demo --watch"
    assert status.missing == ("s1",) and status.state == "recovering"


def test_the_last_server_gone() -> None:
    found = findings(zookeeper=replace(ZOOKEEPER, servers=(), controller=None))
    assert {each.look for each in found} == {"psa server --job demo"}
    assert any("no server is there: 2 workers" in each.what for each in found)


def test_a_worker_gone_leaves_ranks_without_holder() -> None:
    found = findings(zookeeper=replace(ZOOKEEPER, workers=WORKERS[:1]))
    assert [each.severity for each in found] == [Severity.SICK, Severity.WARN], "the worst first"
    assert "rank 1 without a worker" in found[0].what and "worker w1 is gone" in found[1].what


def test_ranks_without_a_worker_in_the_plan() -> None:
    plan = replace(PLAN, cells=("", ""))
    found = findings(zookeeper=replace(ZOOKEEPER, plan=plan, workers=()))
    the_one(found, Severity.SICK, "ranks 0, 1 without a worker", "psa worker SCRIPT")


def test_a_job_at_rest_misses_no_member() -> None:
    rest = replace(ZOOKEEPER, servers=(), workers=(), controller=None)
    status = look(replace(REDIS, heartbeats={}), rest)
    assert status.findings == () and status.state == "at rest"


def test_no_controller() -> None:
    the_one(findings(zookeeper=replace(ZOOKEEPER, controller=None)), Severity.SICK, "controller", "--watch")


def test_commits_that_do_not_keep_up() -> None:
    behind = replace(ANSWER, version=201)
    found = findings(zookeeper=replace(ZOOKEEPER, answers={"s0": ANSWER, "s1": behind}))
    the_one(found, Severity.SICK, "s1 has 101 versions", "50", "psa doctor demo")
    just = replace(ANSWER, version=200)
    assert findings(zookeeper=replace(ZOOKEEPER, answers={"s0": ANSWER, "s1": just})) == []


def test_a_hand_over_that_takes_long_names_what_it_waits_for() -> None:
    frozen = replace(SERVERS[0], frozen_revision=8, frozen_newest=120)
    plan = replace(PLAN, phase=Phase.FREEZE, freeze_revision=8, revision=8)
    waits = replace(ZOOKEEPER, plan=plan, servers=(frozen, SERVERS[1]), plan_time_s=NOW_S - 12.0)
    status = look(zookeeper=waits)
    the_one(list(status.findings), Severity.WARN, "freeze", "12 s", "server s1", "-p 101")
    assert status.state == "handing over"
    assert findings(zookeeper=replace(waits, plan_time_s=NOW_S - 9.0)) == []


def test_a_server_that_cannot_serve() -> None:
    asking = (replace(SERVERS[0], reload_term=PLAN.term), SERVERS[1])
    the_one(findings(zookeeper=replace(ZOOKEEPER, servers=asking)), Severity.SICK, "s0 cannot serve", "pid 100")


def test_a_clock_that_is_ahead() -> None:
    the_one(findings(with_heartbeat("w0", time=NOW_S + 60.0)), Severity.WARN, "60 s ahead", "on node-0: chronyc")


def test_a_worker_whose_heartbeat_is_older_is_not_behind() -> None:
    """Heartbeats come at different times; 10 steps/s and a heartbeat that is older by 0.4 s are 4 steps."""
    status = look(with_heartbeat("w0", time=NOW_S - 0.9, metrics={"step": 116}))
    assert [each.behind for each in status.workers] == [0, 0]
    status = look(with_heartbeat("w0", metrics={"step": 100}))
    assert [each.behind for each in status.workers] == [20, 0]


def test_a_heartbeat_that_changes_is_fresh_whatever_its_clock_says() -> None:
    first = HeartbeatAge.after(None, NOW_S - 40.0, 10.0, NOW_S)
    assert first.age_s == 40.0
    second = HeartbeatAge.after(first, NOW_S - 39.0, 11.0, NOW_S + 1.0)
    assert second.age_s <= 1.0 and second.seen_s == 11.0
    third = HeartbeatAge.after(second, NOW_S - 39.0, 15.0, NOW_S + 5.0)
    assert third.seen_s == 11.0, "unchanged since"


def test_a_heartbeat_that_cannot_be_read_is_not_known_and_breaks_nothing() -> None:
    redis = replace(REDIS, heartbeats=HEARTBEATS | {"w0": None})
    status = look(redis)
    worker = status.workers[0]
    assert worker.id == "w0" and worker.ranks == (0,), "ZooKeeper knows it"
    assert worker.step is None and worker.samples_per_s is None and worker.resident_bytes is None
    assert worker.heartbeat_age_s is None
    the_one(status.findings, Severity.WARN, "the heartbeat of w0 cannot be read", "pip show psa_store")
    look(redis, ZooKeeperView("zk1:2181", 4.0, problem="away"))
    json.dumps(to_fields(status), allow_nan=False)


def test_hundreds_of_ranks_are_written_in_one_line() -> None:
    assert ranks([]) == "" and ranks([1, 0]) == "0, 1" and ranks(range(300)) == "0-299"
    assert ranks([0, 1, 2, 7]) == "0-2, 7"
    assert ranks(range(0, 200, 2)) == "0, 2, 4, 6, 8, 10 and 94 more"


def test_what_is_printed_is_read_back_as_the_same_status() -> None:
    status = look(zookeeper=replace(ZOOKEEPER, servers=SERVERS[:1]))
    assert status.findings and status.gone
    assert from_text(JobStatus, to_text(status), "a status") == status


def test_the_published_schema_of_the_status_is_current() -> None:
    assert json.loads(PATH.read_text()) == status_schema(), "python -m psa_store.observe.status.schema"
