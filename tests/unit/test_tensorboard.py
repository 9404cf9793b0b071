"""Event files for TensorBoard: everything once, whichever process wrote before; read back with its own reader."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from psa_store.errors import UsageError
from psa_store.observe import Event, EventKind
from psa_store.observe.curve import Point
from psa_store.observe.tensorboard import CURVE, Board, check_tensorboard


@pytest.fixture(autouse=True)
def files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files begin with the second, and end with a number that this process counts: 10 would sort before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def point(time_s: float, version: int, **known: Any) -> Point:
    return Point(time_s, version, term=1, **known)


def event(time_s: float, kind: str, version: int | None = None) -> Event:
    return Event(time_s, EventKind(kind), kind, 1, version)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By name, what TensorBoard shows: version and value."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def write(folder: Path, points: list[Point], events: list[Event] | None = None) -> None:
    with closing(Board(folder)) as board:
        board.write(points, events or [])


POINTS = [point(float(i), 10 * i, loss=4.0 - i / 4, learning_rate=0.5, samples_per_s=64.0) for i in range(1, 5)]


def test_a_curve_is_shown_over_versions_and_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "job", POINTS)
    shown = scalars(tmp_path / "job")
    assert shown["loss"] == [(10, 3.75), (20, 3.5), (30, 3.25), (40, 3.0)]
    assert shown["samples_per_s"][0] == (10, 64.0) and shown.keys() == {*CURVE} - {"gradient_norm"}


def test_a_second_look_and_a_second_writer_add_only_what_is_new(tmp_path: Path) -> None:
    events = [event(1.5, "recovered", 10)]
    with closing(Board(tmp_path)) as board:
        board.write(POINTS[:2], [])
        board.write(POINTS[:3], events)
    write(tmp_path, POINTS, [*events, event(3.5, "recovered", 30)])
    write(tmp_path, POINTS, [*events, event(3.5, "recovered", 30)])
    shown = scalars(tmp_path)
    assert [step for step, _ in shown["loss"]] == [10, 20, 30, 40]
    assert shown["recoveries"] == [(10, 1.0), (30, 2.0)], "the count goes on"


def test_a_curve_that_was_thinned_meanwhile_adds_nothing_old(tmp_path: Path) -> None:
    write(tmp_path, POINTS)
    write(tmp_path, [POINTS[0], POINTS[2], point(9.0, 90, loss=1.0)])
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [10, 20, 30, 40, 90]


def test_steps_that_are_computed_again_are_shown_once(tmp_path: Path) -> None:
    write(tmp_path, [*POINTS, point(5.0, 30, loss=9.0), point(6.0, 50, loss=2.5)])
    assert scalars(tmp_path)["loss"][-2:] == [(40, 3.0), (50, 2.5)]


def test_after_a_rollback_the_old_future_is_forgotten(tmp_path: Path) -> None:
    after = [*POINTS, point(6.0, 25, loss=8.0)]
    write(tmp_path, after, [event(5.0, "rollback", 20)])
    assert scalars(tmp_path)["loss"] == [(10, 3.75), (20, 3.5), (25, 8.0)]
    write(tmp_path, [*after, point(7.0, 35, loss=7.0)], [event(5.0, "rollback", 20)])
    assert scalars(tmp_path)["loss"] == [(10, 3.75), (20, 3.5), (25, 8.0), (35, 7.0)], "also by the next writer"


def test_a_writer_that_was_killed_in_a_word_loses_that_word_only(tmp_path: Path) -> None:
    write(tmp_path, POINTS[:3])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    write(tmp_path, POINTS)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [10, 20, 30, 40]


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/job cannot be used for TensorBoard"):
        Board(tmp_path / "file" / "job")


def test_without_tensorboard_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(UsageError, match=r"pip install 'psa_store\[tensorboard\]'"):
        check_tensorboard()
