"""Fault schedules: the same seed gives the same one, and every kind occurs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.barrier.drill import FAULT_KINDS
from chaos.campaign import rows_of
from chaos.faults import FAULTS
from chaos.run import OutOfTime, Patience
from chaos.scenarios import MATRIX, SCENARIOS, SOAK
from chaos.schedule import AT_ONCE_S, REST_S, long_schedule, pace_s, short_schedule
from psa_store.errors import UsageError
from psa_store.testing.failpoints import FAILPOINTS


@given(st.sampled_from(sorted(SCENARIOS)), st.integers(0, 1000))
def test_the_same_seed_gives_the_same_schedule(name: str, seed: int) -> None:
    kinds = SCENARIOS[name].kinds
    assert short_schedule(kinds, name, seed) == short_schedule(kinds, name, seed)
    assert long_schedule(kinds, name, seed, 600, 10) == long_schedule(kinds, name, seed, 600, 10)


@given(st.sampled_from(sorted(name for name, row in SCENARIOS.items() if not row.at_once)), st.integers(0, 1000))
def test_faults_of_a_schedule_do_not_overlap(name: str, seed: int) -> None:
    schedule = SCENARIOS[name].schedule(seed)
    for before, after in itertools.pairwise(schedule):
        assert before.at_s + before.for_s < after.at_s


@given(st.integers(0, 1000))
def test_one_to_four_faults_begin_at_once_and_take_different_things_away(seed: int) -> None:
    row = SCENARIOS["at-once"]
    schedule = row.schedule(seed)
    assert schedule == row.schedule(seed) and [fault.id for fault in schedule] == list(range(1 + seed % 4))
    assert schedule[-1].at_s - schedule[0].at_s <= AT_ONCE_S + 0.001
    for what in ("redis", "-zk-"):
        assert sum(what in fault.kind for fault in schedule) <= 1
    played = {fault.kind for number in range(100) for fault in row.schedule(number)}
    assert played == set(row.kinds)


def test_all_kinds_of_a_row_come_within_a_few_seeds() -> None:
    for row in MATRIX.values():
        assert {short_schedule(row.kinds, row.name, seed)[0].kind for seed in range(len(row.kinds))} == set(row.kinds)


def test_a_soak_has_a_fault_every_so_often_and_every_kind_alike() -> None:
    schedule = long_schedule(SOAK.kinds, "soak", 7, 3600, 10)
    assert len(schedule) == 359
    assert all(each.at_s < later.at_s for each, later in itertools.pairwise(schedule))
    counts = [sum(each.kind == kind for each in schedule) for kind in SOAK.kinds]
    assert max(counts) - min(counts) <= 1


def test_every_kind_of_fault_and_every_failpoint_has_a_row() -> None:
    played = {kind for row in MATRIX.values() for kind in row.kinds}
    assert played == set(FAULTS)
    drilled = {kind.partition("-")[2] for kind in FAULT_KINDS}
    elsewhere = {name for name in FAILPOINTS if name.partition(".")[0] in ("fork", "rollback")}  # by tests/kill
    assert set(FAILPOINTS) <= {kind.partition("-")[2] for kind in played} | drilled | elsewhere


def test_all_does_not_set_the_clock_of_the_machine() -> None:
    assert "clock-jump" in MATRIX and "clock-jump" not in {row.name for row in rows_of(["all"])}


def test_an_unknown_scenario_is_a_usage_error_that_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="kill-worker"):
        rows_of(["no-such"])


def test_a_job_outlasts_its_plan() -> None:
    """Found by stop-zk-follower, seed 2: the job was over before its last fault."""
    for row in MATRIX.values():
        for seed in range(20):
            schedule = short_schedule(row.kinds, row.name, seed)
            assert 200 * pace_s(schedule, 200, 0.01) >= max(each.at_s + each.for_s for each in schedule) + REST_S - 1e-9
    assert pace_s([], 200, 0.01) == REST_S / 200
    assert pace_s([], 10_000, 0.01) == 0.01


def test_a_job_hangs_if_it_completes_no_step_and_not_if_it_is_slow() -> None:
    patience = Patience(end_s=1000.0, still_s=120.0)
    for now_s in range(0, 1000, 100):
        patience.check(now_s, steps=now_s + 1, version=7)
    with pytest.raises(OutOfTime, match="completes no step any more; it is at version 7"):
        patience.check(1021.0, steps=901, version=7)
    with pytest.raises(OutOfTime, match="does not end; it is at version 9"):
        patience.check(1001.0, steps=950, version=9)
