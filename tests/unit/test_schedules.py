"""Schedules as data: their rates, what they are stored as, and rates that were sampled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psa_store import optim
from psa_store.errors import DataIntegrity, UsageError
from psa_store.optim.pieces import TOLERANCE, pieces_of

SCHEDULES: Mapping[str, optim.Schedule] = {
    "constant": optim.constant(0.3),
    "cosine": optim.warmup_cosine(0.3, warmup=7, total=50),
    "linear": optim.linear(0.3, warmup=7, total=50, final=0.1),
    "polynomial": optim.polynomial(0.3, power=2.0, warmup=7, total=50, final=0.1),
    "step": optim.step_decay(0.3, every=7, gamma=0.5),
    "milestones": optim.milestones(0.3, [3, 7, 7, 40], gamma=0.5),
    "exponential": optim.exponential(0.3, gamma=0.99),
    "inverse_sqrt": optim.inverse_sqrt(0.3, warmup=7),
    "one_cycle": optim.one_cycle(0.3, total=50),
    "wsd": optim.warmup_stable_decay(0.3, warmup=7, decay=11, total=50, final=0.1),
    "table": optim.table({0: 0.1, 10: 0.3, 50: 0.0}),
    "table_hold": optim.table([(5, 0.1), (10, 0.3)], between="hold"),
    "pieces": pieces_of([0.1 * math.exp(-step / 20) for step in range(50)]) or optim.constant(0.0),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_json_gives_back_an_equal_schedule(schedule: optim.Schedule) -> None:
    optimizer = optim.SGD(schedule)
    again = optim.from_dict(json.loads(json.dumps(optimizer.to_dict(), allow_nan=False)))
    assert again == optimizer and hash(again) == hash(optimizer)
    assert [again.lr_at(step) for step in range(60)] == [schedule.at(step) for step in range(60)]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_rate_is_a_number_at_every_step_a_job_may_have(schedule: optim.Schedule) -> None:
    assert all(0.0 <= schedule.at(step) < 1.0 for step in (*range(60), 10**9))


@pytest.mark.parametrize(
    ("document", "schedule"),
    [
        ({"shape": "constant", "peak": 0.3, "warmup": 0, "total": 1, "final": 0.3}, SCHEDULES["constant"]),
        ({"shape": "cosine", "peak": 0.3, "warmup": 7, "total": 50, "final": 1e-4}, SCHEDULES["cosine"]),
        ({"shape": "linear", "peak": 0.3, "warmup": 7, "total": 50, "final": 0.1}, SCHEDULES["linear"]),
    ],
)
def test_schedules_of_stored_jobs_are_read_and_written_as_ever(
    document: dict[str, object], schedule: optim.Schedule
) -> None:
    stored = {**optim.SGD(0.1).to_dict(), "lr": document}
    assert optim.from_dict(stored).lr == schedule
    assert optim.from_dict(stored).to_dict() == stored


Torch = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        (SCHEDULES["step"], lambda o: torch.optim.lr_scheduler.StepLR(o, 7, gamma=0.5)),
        (SCHEDULES["milestones"], lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 7, 7, 40], gamma=0.5)),
        (SCHEDULES["exponential"], lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99)),
        (optim.polynomial(0.3, power=2.0, total=50), lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 50, power=2.0)),
        (SCHEDULES["one_cycle"], lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, 50, cycle_momentum=False)),
    ],
)
def test_what_torch_has_too_has_its_rates(schedule: optim.Schedule, theirs: Torch) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = theirs(optimizer)
    for step in range(50):
        assert schedule.at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_the_inverse_square_root_goes_on_where_the_warm_up_ends() -> None:
    schedule = optim.inverse_sqrt(1.0, warmup=3)
    assert [schedule.at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.at(15) == 0.5
    assert optim.inverse_sqrt(1.0, warmup=0).at(0) == 1.0


def test_warm_up_stable_decay_has_three_parts() -> None:
    schedule = optim.warmup_stable_decay(1.0, warmup=1, decay=4, total=8, final=0.2)
    assert [schedule.at(step) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_one_cycle_with_hardly_a_rise_begins_at_its_peak() -> None:
    assert optim.one_cycle(0.3, total=10, rise=0.0).at(0) == 0.3


def test_a_table_is_read_on_straight_lines_or_held() -> None:
    points = {2: 0.1, 4: 0.3}
    assert [optim.table(points).at(step) for step in range(6)] == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.3, 0.3])
    assert [optim.table(points, between="hold").at(step) for step in range(6)] == [0.1, 0.1, 0.1, 0.1, 0.3, 0.3]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: optim.step_decay(0.1, every=0), "every=0"),
        (lambda: optim.milestones(0.1, [5, 3]), "must be in order"),
        (lambda: optim.milestones(0.1, [0.5]), "milestones=0.5"),  # type: ignore[list-item]
        (lambda: optim.exponential(0.1, gamma=-1.0), "gamma=-1"),
        (lambda: optim.polynomial(0.1, power=-1.0), "power=-1"),
        (lambda: optim.one_cycle(0.1, total=1), "total=1"),
        (lambda: optim.one_cycle(0.1, total=10, rise=1.0), "rise=1"),
        (lambda: optim.warmup_stable_decay(0.1, warmup=60, decay=60, total=100), "more steps than total=100"),
        (lambda: optim.table({}), "0 of them"),
        (lambda: optim.table([(3, 0.1), (3, 0.2)]), "must grow"),
        (lambda: optim.table({0: -0.1}), "rate=-0.1"),
        (lambda: optim.table({0: 0.1}, between="cubic"), "between='cubic'"),
    ],
)
def test_unusable_arguments_are_refused_by_name(build: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build()


@pytest.mark.parametrize(
    "document",
    [
        {"shape": "cubic"},
        {"shape": "step", "peak": 0.1},
        {"shape": "pieces", "pieces": [], "total": 1},
        {"shape": "pieces", "pieces": [[1, [0.1]]], "total": 2},
        {"shape": "pieces", "pieces": [[0, []]], "total": 2},
        {"shape": "pieces", "pieces": [[0, [0.1]], [3, [0.1]]], "total": 3},
        {"shape": "table", "points": [[0]], "between": "linear"},
    ],
)
def test_a_damaged_document_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(DataIntegrity, match="cannot be read"):
        optim.from_dict({**optim.SGD(0.1).to_dict(), "lr": document})


# --- sampled rates


def assert_gives(rates: list[float], pieces_max: int) -> None:
    schedule = pieces_of(rates)
    assert schedule is not None and len(schedule.pieces) <= pieces_max
    stored = optim.from_dict(json.loads(json.dumps(optim.SGD(schedule).to_dict())))
    assert [stored.lr_at(step) for step in range(len(rates))] == pytest.approx(
        rates, rel=2 * TOLERANCE, abs=2e-12 * max(rates)
    )


def test_a_cosine_of_any_length_takes_a_hundred_pieces() -> None:
    for steps in (1_000, 30_000):
        assert_gives([3e-4 * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps + 1)], 150)


def test_a_rate_that_changes_now_and_then_takes_a_piece_a_change() -> None:
    assert_gives([0.1 ** (1 + step // 300) for step in range(1000)], 4)
    assert_gives([min(step, 1000 - step) * 1e-6 for step in range(1000)], 2)


def test_rates_without_a_rule_are_too_many_pieces() -> None:
    draw = torch.Generator().manual_seed(0)
    rates = torch.rand(20_000, generator=draw).tolist()
    assert pieces_of(rates) is None
    assert_gives(rates[:500], 500)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=20))
def test_stairs_are_read_back_exactly_to_nine_digits(stairs: list[tuple[int, float]]) -> None:
    rates = [rate for length, rate in stairs for _ in range(length)]
    schedule = pieces_of(rates)
    assert schedule is not None
    assert [schedule.at(step) for step in range(len(rates))] == pytest.approx(rates, rel=2e-8, abs=2e-12)
    assert schedule.at(10**6) == pytest.approx(rates[-1], rel=2e-8, abs=2e-12)
