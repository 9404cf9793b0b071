"""What heartbeats, points and events say: pure."""

from __future__ import annotations

from dataclasses import replace

from psa_store.cluster import Cell, Member, Plan, ProcessRole, Server, TakeOver, View
from psa_store.job.document import from_fields, from_text, to_fields, to_text
from psa_store.observe import Event, EventKind, Events
from psa_store.observe.curve import Curve, Point
from psa_store.observe.heartbeat import Heartbeat, Rates, Reported, finite, mean_reported

PLAN = Plan(
    term=7,
    revision=3,
    resume=1200,
    servers=(Server("s1", "", "", ""), Server("s2", "", "", "")),
    owners=(0, 1),
    cells=("w1", "w2"),
)


def view(servers: str, workers: str, plan: Plan | None = PLAN) -> View:
    members = {name: Member(name, "host", 1) for name in (servers + " " + workers).split()}
    return View(
        plan=plan,
        servers={name: members[name] for name in servers.split()},
        workers={name: members[name] for name in workers.split()},
        shard_sizes=(1, 1),
        ranks=2,
    )


def kinds(events: Events) -> list[tuple[str, str]]:
    return [(note.event.kind.value, note.event.member) for note in events.drain()]


def server(time: float, version: int, shards: int = 2, member: str = "s", **metrics: float) -> Heartbeat:
    return Heartbeat(member, ProcessRole.SERVER, time, shards=shards, metrics={"version": version, **metrics})


def worker(time: float, *ranks: int, **metrics: float) -> Heartbeat:
    return Heartbeat("w", ProcessRole.WORKER, time, ranks=ranks, samples_per_s=10.0, metrics=metrics)


class TestMembers:
    def test_a_new_controller_tells_which_members_of_the_plan_are_gone(self) -> None:
        events = Events()
        events.see(view("s2", "w1 w2 w3"))
        assert kinds(events) == [("server-gone", "s1"), ("worker-joined", "w3")]
        assert events.members == {"s2", "w1", "w2", "w3"}

    def test_then_each_change_is_told_once(self) -> None:
        events = Events()
        events.see(view("s1 s2", "w1 w2"))
        events.see(view("s1 s2", "w1 w2"))
        assert kinds(events) == []
        events.see(view("s1", "w1 w2"))
        events.see(view("s1", "w2"))
        assert kinds(events) == [("server-gone", "s2"), ("worker-gone", "w1")]

    def test_a_member_that_withdrew_its_heartbeat_has_left_and_one_that_did_not_is_gone(self) -> None:
        events = Events()
        events.see(view("s1", "w2"))
        found = [note.complete({"s2": server(0.0, 0), "w2": None}) for note in events.drain()]
        told = [(each.kind, each.text, each.member) for each in found]
        assert told == [("server-gone", "server s2 is gone", "s2"), ("worker-left", "worker w1 has left", "w1")]

    def test_a_job_without_a_plan_sees_all_of_them_come(self) -> None:
        events = Events()
        events.see(view("s1", "w1", plan=None))
        assert kinds(events) == [("server-joined", "s1"), ("worker-joined", "w1")]

    def test_a_server_that_is_no_longer_controller_knows_no_members(self) -> None:
        events = Events()
        events.see(view("s1", "w1"))
        events.resign()
        assert events.members is None


class TestTakeOvers:
    def taken(self, before: Plan | None, reason: str, resume: int, reached: int = 0) -> Events:
        events = Events()
        begun = replace(PLAN, term=8, resume=resume)
        events.took_over(TakeOver(PLAN.servers, PLAN.owners, PLAN.cells, 1, reason), before, begun, 0.314, reached)
        return events

    def test_a_job_is_created_once(self) -> None:
        assert [kind for kind, _ in kinds(self.taken(None, "no plan", 0))] == ["created", "term"]
        assert [kind for kind, _ in kinds(self.taken(None, "no plan", 50))] == ["term"]
        at_rest = replace(PLAN, servers=(), owners=())
        assert [kind for kind, _ in kinds(self.taken(at_rest, "the shards have no owner", 50))] == ["term"]

    def test_a_hand_over_is_no_recovery(self) -> None:
        assert [kind for kind, _ in kinds(self.taken(PLAN, "hand-over at version 50", 50))] == ["hand-over"]

    def test_a_recovery_says_what_it_cost(self) -> None:
        (note,) = self.taken(PLAN, "server s1 is gone", 1200, reached=1207).drain()
        text = "server s1 is gone; term 8 began at version 1200, took 0.31 s, 7 versions are computed again"
        assert note.complete({}) == Event(note.event.time, EventKind.RECOVERED, text, 8, 1200, computed_again=7)

    def test_a_server_that_just_came_believes_the_heartbeats_of_the_term_before(self) -> None:
        (note,) = self.taken(PLAN, "server s1 is gone", 1200, reached=0).drain()
        event = note.complete({"s1": server(0.0, 1201, term=7), "s2": server(0.0, 1300, term=8), "strange": None})
        assert event.text.endswith(", 1 version is computed again") and event.computed_again == 1
        assert note.complete({}).computed_again == 0


def test_notes_are_bounded_and_the_oldest_go() -> None:
    events = Events()
    for number in range(300):
        events.note(EventKind.MEMBERS, str(number))
    kept = events.drain()
    assert [note.event.text for note in kept] == [str(number) for number in range(44, 300)]
    for number in range(255):
        events.note(EventKind.MEMBERS, f"new {number}")
    events.put_back(kept)
    assert [note.event.text for note in events.drain()][:2] == ["299", "new 0"]


def test_a_note_hides_passwords() -> None:
    events = Events()
    events.note(EventKind.CHECKPOINT, "checkpoint a is in files: ftp://me:secret@there/a")
    (note,) = events.drain()
    assert note.event.text == "checkpoint a is in files: ftp://me:***@there/a"


def test_what_could_not_be_written_comes_first_again() -> None:
    events = Events()
    for text in ("a", "b"):
        events.note(EventKind.MEMBERS, text)
    notes = events.drain()
    events.note(EventKind.MEMBERS, "c")
    events.put_back(notes)
    assert [note.event.text for note in events.drain()] == ["a", "b", "c"]


def test_a_plan_that_only_enters_a_phase_is_no_news() -> None:
    events = Events()
    events.planned(PLAN, replace(PLAN, revision=4, freeze_revision=4), "members changed")
    assert kinds(events) == []
    events.planned(PLAN, replace(PLAN, cells=("w1", "w1")), "workers changed")
    (note,) = events.drain()
    assert note.event.text == "workers changed: 1 workers hold the 2 ranks, 2 servers the shards"


def test_events_of_a_model_in_stages_say_what_is_shared_out() -> None:
    events, plan = Events(), replace(PLAN, cells=("w1", "w1", "w2", "w2"), stages=2)
    events.planned(PLAN, plan, "workers changed")
    events.took_over(
        TakeOver(plan.servers, plan.owners, plan.cells, 1, "no plan"), None, replace(plan, resume=0), 0.1, 0
    )
    told = [note.event.text for note in events.drain()]
    assert told[0] == "workers changed: 2 workers hold the 2 stages of 2 ranks, 2 servers the shards"
    assert told[1] == "the job was created, with 2 stages of 2 ranks"


def test_rates_are_those_of_the_last_seconds() -> None:
    rates = Rates(("steps", "samples"))
    assert rates.update(10.0, {"steps": 5}) == {"steps": 0.0, "samples": 0.0}
    assert rates.update(11.0, {"steps": 25, "samples": 40}) == {"steps": 20.0, "samples": 40.0}
    for second in range(12, 30):
        found = rates.update(float(second), {"steps": 25, "samples": 40.0 * (second - 10)})
    assert found == {"steps": 0.0, "samples": 40.0}


def test_json_is_not_asked_to_say_infinity() -> None:
    assert finite({"a": 1.0, "b": float("inf"), "c": float("nan")}) == {"a": 1.0}


class TestCurve:
    def test_a_point_is_what_all_say_together(self) -> None:
        heartbeats = [
            server(100.0, 41, committed_version=40, term=3, gradient_norm=2.5),
            server(100.0, 42, committed_version=30, term=3, gradient_norm=2.5),
            server(100.0, 0, shards=0),
            worker(100.0, 1, loss=9.0),
            worker(100.0, 0, 2, loss=1.5, learning_rate=0.1),
        ]
        assert Curve().point(100.5, heartbeats) == Point(
            time=100.5,
            version=41,
            committed=30,
            term=3,
            loss=1.5,
            learning_rate=0.1,
            gradient_norm=2.5,
            samples_per_s=20.0,
            steps_per_s=0.0,
            workers=2,
            servers=3,
        )

    def test_what_is_not_known_is_none(self) -> None:
        point = Curve().point(100.0, [server(100.0, 41)])
        assert point is not None
        assert (point.loss, point.learning_rate, point.gradient_norm) == (None, None, None)

    def test_old_heartbeats_say_nothing(self) -> None:
        assert Curve().point(100.0, [server(90.0, 41)]) is None

    def test_metrics_of_scripts_are_averaged_over_ranks_by_their_weights(self) -> None:
        def said(*ranks: int, **weights: float) -> Heartbeat:
            reported = {int(rank[1:]): Reported(weight, {"accuracy": weight}) for rank, weight in weights.items()}
            return Heartbeat("w", ProcessRole.WORKER, 0.0, ranks=ranks, reported=reported)

        beats = [said(1, r1=3.0), said(0, 2, r0=1.0, r2=0.0, r1=100.0)]  # it held rank 1 before
        assert mean_reported(beats) == {"accuracy": 10.0 / 4.0}
        assert from_text(Heartbeat, to_text(beats[1]), "heartbeat") == beats[1]
        assert mean_reported([said(0, r0=0.0)]) == {}

    def test_in_stages_the_last_one_has_the_loss_and_what_scripts_say(self) -> None:
        def said(*cells: Cell, loss: float) -> Heartbeat:
            reported = {cell.rank: Reported(1.0, {"accuracy": loss}) for cell in cells}
            ranks = tuple(cell.rank for cell in cells)
            metrics = {"loss": loss}
            beat = Heartbeat("w", ProcessRole.WORKER, 100.0, ranks=ranks, stages=2, cells=cells, metrics=metrics)
            return replace(beat, reported=reported)

        beats = [said(Cell(0, 0), Cell(1, 1), loss=9.0), said(Cell(0, 1), Cell(1, 0), loss=1.0)]
        point = Curve().point(100.0, [server(100.0, 41), *beats])
        assert point is not None and point.loss == 1.0
        assert mean_reported(beats[:1]) == {"accuracy": 9.0} and mean_reported(beats) == {"accuracy": 5.0}
        assert from_text(Heartbeat, to_text(beats[0]), "heartbeat") == beats[0]
        assert not {"stages", "cells", "waits_for", "waits_s"} & to_fields(worker(0.0, 1)).keys()

    def test_waiting_is_counted_from_the_last_point_that_was_kept(self) -> None:
        def spent(member: str, computed_s: float, waited_s: float) -> Heartbeat:
            metrics = {"compute_seconds": computed_s, "wait_seconds": waited_s}
            cells = (Cell(0, 0),)
            return Heartbeat(member, ProcessRole.WORKER, 100.0, stages=2, cells=cells, metrics=metrics)

        curve = Curve()
        first = curve.point(100.0, [server(100.0, 41), spent("a", 5.0, 50.0)])
        assert first is not None and first.waiting is None
        curve.kept(first)
        curve.point(100.0, [server(100.0, 42), spent("a", 6.0, 50.0)])
        point = curve.point(100.0, [server(100.0, 43), spent("a", 8.0, 51.0), spent("new", 9.0, 99.0)])
        assert point is not None and point.waiting == 0.25
        assert "waiting" not in to_fields(first)

    def test_there_is_no_new_point_until_the_job_moves(self) -> None:
        curve = Curve()
        point = curve.point(100.0, [server(100.0, 41)])
        assert point is not None and curve.point(101.0, [server(101.0, 41)]) is not None
        curve.kept(point)
        assert curve.point(102.0, [server(102.0, 41)]) is None
        assert curve.point(103.0, [server(103.0, 42)]) is not None
        assert curve.point(104.0, [server(104.0, 41, term=2)]) is not None

    def test_the_speed_is_by_the_clock_of_the_server(self) -> None:
        curve = Curve()
        curve.point(100.0, [server(99.9, 40)])
        speeds = []
        for now, told, version in [(101.0, 99.9, 40), (102.0, 101.9, 80), (103.0, 102.9, 60)]:
            point = curve.point(now, [server(told, version)])
            assert point is not None
            speeds.append(point.steps_per_s)
        assert speeds == [0.0, 20.0, 0.0]


def test_a_newer_release_may_add_fields_and_numbers_that_json_does_not_know_are_not_known() -> None:
    point = Point(time=1.0, version=5, loss=0.5)
    fields = to_fields(point)
    assert from_fields(Point, {**fields, "moon": "full"}, "a point") == point
    assert from_fields(Point, {**fields, "loss": float("nan")}, "a point").loss is None
