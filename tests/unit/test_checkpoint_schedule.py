"""When a checkpoint is taken, where it is cut, and when an attempt is given up: decided without a clock or a door."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.checkpoint.schedule import Patience, Schedule
from psa_store.job.config import JobConfig
from psa_store.job.mode import parse_mode


def config(mode: str = "sync", commit_every: int = 10) -> JobConfig:
    return JobConfig("job", 4, 0, {"name": "sgd"}, "layout", commit_every=commit_every, mode=parse_mode(mode))


def test_one_is_due_an_interval_after_the_last_and_none_before_that_is_known() -> None:
    schedule = Schedule(config(), every_s=60.0)
    assert not schedule.knows_the_last and not schedule.is_due(1e9)
    schedule.last_taken(1000.0)
    assert schedule.knows_the_last
    assert not schedule.is_due(1059.0) and schedule.is_due(1060.0)
    schedule.taken(1070.0)
    assert not schedule.is_due(1129.0) and schedule.is_due(1130.0)


def test_without_an_interval_none_is_ever_due() -> None:
    schedule = Schedule(config(), every_s=None)
    assert schedule.knows_the_last
    schedule.taken(0.0)
    assert not schedule.is_due(1e9)


@given(st.integers(0, 1000), st.integers(0, 20), st.booleans(), st.booleans())
def test_it_is_cut_ahead_of_training_and_by_itself_only_at_a_commit(
    version: int, commit_every: int, attended: bool, asked: bool
) -> None:
    target = Schedule(config(commit_every=commit_every), None).version_to_cut(version, attended=attended, asked=asked)
    assert target is not None and target >= version + (2 if attended else 0)
    if commit_every and not asked:
        assert target % commit_every == 0 and target < version + 2 + commit_every
    if asked:
        assert target <= version + 2


def test_where_ranks_keep_state_it_is_cut_at_a_commit_though_asked_for() -> None:
    schedule = Schedule(config("local:steps=2"), None)
    assert schedule.version_to_cut(11, attended=True, asked=True) == 20


def test_on_arrival_ranks_say_where_and_a_worker_must_hold_them() -> None:
    schedule = Schedule(config("async"), None)
    assert schedule.version_to_cut(11, attended=True, asked=True) is None
    assert "no worker holds a rank" in str(schedule.refusal(changes=True, attended=False))
    assert schedule.refusal(changes=True, attended=True) is None
    assert Schedule(config(), None).refusal(changes=True, attended=False) is None


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_job_that_never_changes_has_none(mode: str) -> None:
    assert "nothing" in str(Schedule(config(mode), None).refusal(changes=False, attended=True))


def test_a_cut_that_a_server_missed_lies_further_ahead_next_time_until_one_succeeds() -> None:
    schedule = Schedule(config(), None)

    def ahead() -> int | None:
        return schedule.version_to_cut(0, attended=True, asked=True)

    distances = [ahead()]
    for _ in range(3):
        schedule.missed()
        distances.append(ahead())
    schedule.taken(0.0)
    distances.append(ahead())
    assert distances == [2, 4, 8, 16, 8]


def test_each_failure_in_a_row_rests_longer() -> None:
    schedule, now_s, rests_s = Schedule(config(), None), 0.0, []
    for _ in range(8):
        assert not schedule.rests(now_s)
        schedule.failed(now_s)
        began_s = now_s
        while schedule.rests(now_s):
            now_s += 1.0
        rests_s.append(now_s - began_s)
    assert rests_s == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]
    schedule.taken(0.0)
    schedule.failed(now_s)
    assert not schedule.rests(now_s + 5.0)


def test_an_attempt_goes_on_as_long_as_training_moves() -> None:
    patience = Patience(config(), "barrier", 0.0)
    assert patience.asks_for_progress
    assert not patience.is_over(599.0) and patience.is_over(600.0)
    assert not patience.stands_still(600.0, 7)
    assert not patience.is_over(1199.0)
    assert not patience.stands_still(1200.0, None), "what is not known is no reason"
    assert not patience.stands_still(1800.0, 8)
    assert patience.stands_still(2400.0, 8)


def test_ranks_that_are_past_the_cut_do_not_wait_for_ever() -> None:
    patience = Patience(config("async"), "barrier", 100.0)
    assert not patience.asks_for_progress
    assert not patience.is_over(129.0) and patience.is_over(130.0)
