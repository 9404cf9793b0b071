"""What the report makes of histories that were written by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from psa_store.checkpoint.catalog import Checkpoint, Reason
from psa_store.errors import UsageError
from psa_store.job.config import JobConfig
from psa_store.job.document import from_fields
from psa_store.observe import Event, EventKind
from psa_store.observe.curve import Point
from psa_store.observe.formatting import duration
from psa_store.observe.report import Run, State, describe_run, facts, to_json, write_report
from psa_store.observe.report.page import page
from psa_store.observe.report.picture import _lanes, draw
from psa_store.observe.report.time_axis import TimeAxis

T0 = 1.8e9
RATE = 10
EVIL = "<script>alert(1)</script>"
PNG = b"\x89PNG\r\n\x1a\n"


def point(second: float, version: int, term: int = 1, **others: Any) -> Point:
    """As it is read: what JSON cannot say is not known."""
    plain = {"committed": version, "loss": 1.0, "samples_per_s": 80.0, "steps_per_s": 10.0, "workers": 2, "servers": 2}
    fields = {"format": Point.FORMAT, "time": T0 + second, "version": version, "term": term, **plain, **others}
    return from_fields(Point, fields, "a point")


def calm(begin: int, end: int, version: int, term: int = 1, **others: Any) -> list[Point]:
    """A point a second, RATE versions each; the first is at ``version``."""
    return [point(second, version + RATE * (second - begin), term, **others) for second in range(begin, end + 1)]


def event(second: float, kind: str, text: str = "", version: int | None = None, member: str = "") -> Event:
    return Event(T0 + second, EventKind(kind), text, 1, version, member)


def recovered(second: float, member: str, version: int, again: int) -> Event:
    text = f"server {member} is gone; term 2 began at version {version}, took 0.01 s, {again} versions are"
    found = event(second, "recovered", f"{text} computed again", version)
    return replace(found, term=2, computed_again=again)


def describe(points: Iterable[Point], *events: Event) -> Run:
    return describe_run("job", points, events, ())


def lengths(run: Run) -> dict[State, float]:
    return {State.RUNNING: run.running_s, State.DOWN: run.down_s, State.REST: run.rest_s}


class TestGoodput:
    def test_of_a_calm_run_is_one(self) -> None:
        run = describe(calm(0, 60, 0), event(0, "term", version=0))
        assert run.goodput == pytest.approx(1.0)
        assert (run.version, run.versions_per_s, run.failures, run.samples) == (600, 10.0, (), 4800.0)

    def test_a_gap_is_time_lost(self) -> None:
        run = describe(calm(0, 40, 0) + calm(60, 100, 400))
        assert run.goodput == pytest.approx(0.8)
        assert lengths(run) == {State.RUNNING: 80.0, State.DOWN: 20.0, State.REST: 0.0}

    def test_what_moved_unseen_was_not_down(self) -> None:
        run = describe(calm(0, 40, 0) + calm(60, 100, 600))
        assert run.goodput == pytest.approx(1.0)
        assert lengths(run)[State.DOWN] == 0.0

    def test_a_rest_is_no_time(self) -> None:
        run = describe(
            calm(0, 40, 0) + calm(1001, 1041, 410),
            event(40.0, "members", "the last server leaves"),
            event(999.0, "server-joined", member="s"),
            event(1000.0, "term", version=400),
        )
        assert run.goodput == pytest.approx(1.0)
        assert lengths(run) == {State.RUNNING: 81.0, State.DOWN: 0.0, State.REST: 960.0}

    def test_a_rest_in_which_it_was_told_to_go_back_is_one(self) -> None:
        run = describe(
            calm(0, 40, 0) + calm(1001, 1041, 210),
            event(500.0, "rollback", version=200),
            event(1000.0, "term", version=200),
        )
        assert lengths(run) == {State.RUNNING: 81.0, State.DOWN: 0.0, State.REST: 960.0}
        assert run.goodput == pytest.approx(610 / 810)
        assert [(each.version, each.lost) for each in run.rollbacks] == [(200, 200)]

    def test_a_job_that_was_told_to_go_back_after_its_end_still_rests(self) -> None:
        run = describe(calm(0, 40, 0), event(40.5, "finished", version=404), event(90.0, "rollback", version=200))
        assert lengths(run) == {State.RUNNING: 40.5, State.DOWN: 0.0, State.REST: 49.5}
        assert run.version == 200

    def test_when_everything_died_it_is_down_until_it_is_run_again(self) -> None:
        run = describe(
            calm(0, 40, 0) + calm(60, 100, 390, term=2),
            event(59.0, "server-gone", "server a is gone", member="a"),
            event(59.0, "worker-gone", "worker b is gone", member="b"),
            recovered(59.0, "a", 380, 20),
        )
        (failure,) = run.failures
        assert (failure.what, failure.time, failure.computed_again) == ("server and worker died", T0 + 40, 20)
        assert failure.pause_s == pytest.approx(20 - (390 - 400 + 20) / RATE)
        assert lengths(run)[State.DOWN] == 19.0

    def test_versions_computed_again_count_once(self) -> None:
        run = describe(calm(0, 50, 0) + calm(51, 100, 410, term=2), recovered(50.0, "a", 400, 100))
        assert run.goodput == pytest.approx((400 + 500) / 1000, abs=0.02)
        assert run.computed_again == 100

    def test_what_a_rollback_left_behind_does_not_count(self) -> None:
        run = describe(calm(0, 50, 0) + calm(51, 100, 110, term=2), event(50.0, "rollback", version=100))
        assert run.goodput == pytest.approx((100 + 500) / 1000, abs=0.02)
        assert [(each.version, each.lost) for each in run.rollbacks] == [(100, 400)]
        assert run.failures == ()

    def test_what_was_left_behind_took_the_time_of_those_that_made_it(self) -> None:
        small = [point(second, 600 + 4 * (second - 60), workers=1) for second in range(61, 86)]
        run = describe(calm(0, 60, 0) + small + calm(86, 135, 510, term=2), event(85.5, "rollback", version=500))
        assert run.goodput == pytest.approx((50 + 50) / 135, abs=0.02)

    def test_a_smaller_job_is_not_a_worse_one(self) -> None:
        small = [point(second, 500 + 4 * (second - 50), workers=1) for second in range(51, 101)]
        assert describe(calm(0, 50, 0) + small).goodput == pytest.approx(1.0, abs=0.02)

    def test_is_never_more_than_one(self) -> None:
        fast = [point(second, 500 + 90 * (second - 50)) for second in range(51, 60)]
        assert describe(calm(0, 50, 0) + fast).goodput == 1.0


class TestFailures:
    def test_the_death_of_a_server_is_one_failure_with_its_recovery(self) -> None:
        # It died at 10.5, which was noticed at 14, and training went on at 15, 30 versions before.
        run = describe(
            calm(0, 10, 0) + calm(16, 40, 85, term=2),
            event(14.0, "server-gone", "server a is gone", member="a"),
            recovered(15.0, "a", 75, 30),
            event(20.0, "hand-over", "hand-over at version 120", 120),
        )
        (failure,) = run.failures
        assert (failure.what, failure.servers, failure.version, failure.computed_again) == (
            "server died",
            ("a",),
            75,
            30,
        )
        assert failure.pause_s == pytest.approx(6 - (85 - 100 + 30) / RATE)
        assert failure.recovered_s == T0 + 15

    def test_the_death_of_a_worker_needs_no_term(self) -> None:
        run = describe(calm(0, 10, 0) + calm(14, 40, 110), event(12.0, "worker-gone", "worker w is gone", member="w"))
        (failure,) = run.failures
        assert (failure.what, failure.recovered_s, failure.computed_again) == ("worker died", None, 0)
        assert failure.pause_s == pytest.approx(3.0)

    def test_a_term_that_answers_late_belongs_to_the_failure_that_it_names(self) -> None:
        run = describe(
            calm(0, 60, 0),
            event(10.0, "server-gone", "server a is gone", member="a"),
            event(20.0, "worker-gone", "worker w is gone", member="w"),
            recovered(30.0, "a", 300, 0),
        )
        assert [(each.what, each.recovered_s) for each in run.failures] == [
            ("server died", T0 + 30),
            ("worker died", None),
        ]

    def test_a_term_for_another_reason_is_a_failure_without_a_death(self) -> None:
        run = describe(calm(0, 60, 0), event(30.0, "recovered", "server a cannot serve what it owns", 300))
        assert [(each.what, each.servers) for each in run.failures] == [("new term", ())]

    def test_a_death_that_is_noticed_just_after_the_recovery_belongs_to_it(self) -> None:
        run = describe(
            calm(0, 60, 0),
            event(10.0, "server-gone", "server a is gone", member="a"),
            recovered(10.2, "a", 90, 10),
            event(10.4, "worker-gone", "worker w is gone", member="w"),
        )
        (failure,) = run.failures
        assert (failure.what, failure.recovered_s, failure.computed_again) == ("server and worker died", T0 + 10.2, 10)

    def test_heartbeats_from_before_do_not_show_that_it_went_on(self) -> None:
        run = describe([*calm(0, 10, 0), point(12, 108), *calm(16, 40, 85, term=2)], recovered(11.5, "a", 75, 33))
        assert run.failures[0].pause_s == pytest.approx(6 - (85 - 100 + 33) / RATE, abs=2.0)
        assert (run.failures[0].pause_s or 0.0) > 3.0

    def test_a_process_that_leaves_in_order_has_not_failed(self) -> None:
        left = [event(20.0, f"{role}-left", f"{role} a has left", member="a") for role in ("server", "worker")]
        assert describe(calm(0, 60, 0), *left).failures == ()

    def test_one_after_which_nothing_came_has_no_pause(self) -> None:
        run = describe(calm(0, 10, 0), event(12.0, "worker-gone", "worker w is gone", member="w"))
        assert [each.pause_s for each in run.failures] == [None]


class TestOddHistories:
    def test_nothing(self) -> None:
        run = describe([])
        assert (run.goodput, run.versions_per_s, run.version, run.segments) == (None, None, 0, ())
        check_files(run)

    def test_events_alone(self) -> None:
        check_files(describe([], event(0, "created", version=0), event(0, "term", version=0)))
        check_files(describe([], event(0, "worker-gone", member="w"), event(9, "finished", version=3)))

    def test_one_point(self) -> None:
        run = describe([point(0, 7)])
        assert (run.goodput, run.version) == (None, 7)
        check_files(run)

    def test_losses_that_are_none_or_no_number(self) -> None:
        losses = [None, math.nan, math.inf, 2.5, -1.0, None]
        run = describe([point(second, 10 * second, loss=loss) for second, loss in enumerate(losses)])
        assert [each.loss for each in run.points] == [None, None, None, 2.5, -1.0, None]
        assert (run.loss, run.loss_min) == (-1.0, -1.0)
        check_files(run)
        check_files(describe(calm(0, 90, 0, loss=None)))

    def test_a_curve_whose_interval_grows(self) -> None:
        """Points every 16 seconds are no gaps, and a gap is still one."""
        thinned = [point(second, RATE * second) for second in range(0, 1600, 16)]
        run = describe([*thinned, point(2000, 15_990), point(2016, 16_150)])
        assert run.interval_s == 16.0
        assert lengths(run)[State.DOWN] == 2000 - 1584
        assert run.goodput == pytest.approx(1615 / 2016, abs=0.01)

    def test_a_clock_that_goes_back(self) -> None:
        back = [replace(each, time=each.time - 30) for each in calm(51, 100, 510)]
        run = describe(calm(0, 50, 0) + back)
        assert run.clock_back_s == 29.0
        assert run.goodput is not None and 0.0 < run.goodput <= 1.0
        assert [a for a, _ in facts(run)][-1] == "clocks"
        check_files(run)

    def test_events_that_were_written_late_stand_where_they_belong(self) -> None:
        run = describe(
            calm(0, 60, 0),
            event(61.0, "finished", version=600),
            event(30.0, "worker-gone", "worker w is gone", member="w"),
        )
        assert run.finished and [each.time for each in run.failures] == [T0 + 30]

    def test_heartbeats_from_before_the_end_do_not_undo_it(self) -> None:
        run = describe([*calm(0, 19, 0), point(20.5, 195)], event(20.0, "finished", version=200))
        assert (run.version, run.goodput) == (200, pytest.approx(1.0))

    def test_a_job_that_goes_on_after_its_end_is_not_finished(self) -> None:
        ended = [event(20.0, "finished", version=200)]
        assert describe(calm(0, 20, 0), *ended).finished
        assert not describe(calm(0, 20, 0), *ended, event(30.0, "rollback", version=100)).finished


class TestTimeAxis:
    def test_a_rest_takes_little_room_and_no_time(self) -> None:
        run = describe(calm(0, 100, 0) + calm(9000, 9100, 1000), event(9000.0, "term", version=1000))
        time_axis = TimeAxis(run.segments, run.begin)
        assert time_axis.length == pytest.approx(204.0)
        assert time_axis.place(T0 + 50) == 50.0 and time_axis.place(T0 + 9050) == pytest.approx(154.0)
        assert time_axis.place(T0 - 5) == 0.0 and time_axis.place(T0 + 10_000) == time_axis.length
        assert {text: place for place, text in time_axis.ticks()}["150"] == pytest.approx(154.0)

    def test_units_fit(self) -> None:
        for seconds, unit in ((200, "seconds"), (2000, "minutes"), (20_000, "hours"), (400_000, "days")):
            run = describe([point(0, 0), point(seconds, 10)])
            time_axis = TimeAxis(run.segments, run.begin)
            assert time_axis.unit == unit and 3 <= len(time_axis.ticks()) <= 9


def test_labels_do_not_touch_and_stay_inside() -> None:
    lanes = _lanes([0.1, 0.11, 0.12, 0.13, 0.14, 0.9], ["a label"] * 6)
    assert lanes == [0, 1, 2, None, None, 0]


def eventful(job: str = "job") -> Run:
    name = "<b>early</b>"
    kept = Checkpoint(name, 300, 300, 1, T0 + 30, Reason.ASKED, True, 1 << 20, {})
    return describe_run(
        job,
        calm(0, 50, 0) + calm(60, 100, 410, term=2),
        [
            event(0, "term", version=0),
            event(55.0, "server-gone", "server s is gone", member=EVIL),
            recovered(56.0, EVIL, 400, 100),
            event(80.0, "rollback", "the job was told to go back", 300),
        ],
        [kept],
    )


def check_files(run: Run) -> None:
    """Whatever the history: a picture, a page that fetches nothing, and numbers that JSON can say."""
    picture = draw(run)
    assert picture.startswith(PNG) and len(picture) > 5000
    json.dumps(to_json(run), allow_nan=False)
    text = page(run, picture)
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|(https?:)""", text)
    assert [match[0][:22] for match in addresses] == ["data:image/png;base64,"]


def test_the_page_lists_all_and_escapes_names() -> None:
    run = eventful()
    check_files(run)
    text = page(run, b"")
    assert "&lt;b&gt;early&lt;/b&gt;" in text and "<b>early" not in text and "alert(1)" in text and EVIL not in text
    for name in ("failures", "rollbacks", "checkpoints"):
        table = text[text.index(f'<table id="{name}">') :].partition("</table>")[0]
        assert table.count("<tr>") == 2
    assert "10.0 s" in text or duration(run.failures[0].pause_s or 0.0) in text


def test_a_model_in_stages_is_named_as_such() -> None:
    config = JobConfig("job", 2, 0, {"name": "sgd"}, "layout", stages=3, microbatches=8)
    run = describe_run("job", calm(0, 9, 0), (), (), config)
    assert facts(run)[0] == ("model", "3 stages, 8 micro-batches") and to_json(run)["stages"] == 3
    assert "workers wait" not in dict(facts(run)), "it is not known"
    run = describe_run("job", [point(0, 0), point(1, 10, waiting=0.5), point(2, 20, waiting=0.25)], (), (), config)
    said = "38% of their time; with a worker for each cell, 20% are the pipeline's own"
    assert dict(facts(run))["workers wait"] == said
    whole = describe_run("job", calm(0, 9, 0), (), (), replace(config, stages=1, microbatches=1))
    assert facts(whole)[0][0] == "version" and "stages" not in to_json(whole)


def test_files_appear_whole_and_replace_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        html, png = write_report(eventful(), folder)
        assert png.read_bytes().startswith(PNG) and html.read_text().endswith("</html>\n")
        assert sorted(path.name for path in folder.iterdir()) == ["report-job.html", "report-job.png"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"report cannot be written into .*file.*--out"):
        write_report(eventful(), tmp_path / "file")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'psa_store\[report\]'"):
        write_report(eventful(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_durations_are_short() -> None:
    told = [duration(seconds) for seconds in (0.04, 59.94, 61, 3599.6, 90_061, 700_000)]
    assert told == ["0.0 s", "59.9 s", "1 min 1 s", "1 h 0 min", "25 h 1 min", "8 d 2 h"]
