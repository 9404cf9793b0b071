"""The optimizer of each step, whatever the order in which its numbers were changed."""

from __future__ import annotations

import pytest

from psa_store.job.change import Change, Numbers
from psa_store.optim import SGD, warmup_cosine
from psa_store.optim.history import OptimizerHistory


def lr(step: int, rate: float) -> Change:
    return Change(step, Numbers(lr=rate))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], {0: 0.1, 500: 0.1}),
        ([lr(50, 0.2), lr(100, 0.3)], {49: 0.1, 50: 0.2, 99: 0.2, 100: 0.3}),
        ([lr(50, 0.2), lr(50, 0.3)], {49: 0.1, 50: 0.3}),
        ([lr(100, 0.2), lr(80, 0.3), lr(50, 0.4)], {49: 0.1, 50: 0.4, 60: 0.4, 90: 0.4, 120: 0.4}),
        ([lr(100, 0.2), lr(50, 0.3), lr(70, 0.4)], {49: 0.1, 60: 0.3, 80: 0.4, 120: 0.4}),
    ],
    ids=["none", "ascending", "same", "rollbacks", "between"],
)
def test_the_change_that_was_made_last_counts_from_its_step_on(
    changes: list[Change], expected: dict[int, float]
) -> None:
    history = OptimizerHistory(SGD(lr=0.1), changes)
    assert {step: history.at(step).lr_at(step) for step in expected} == expected


def test_a_change_of_another_number_brings_no_later_one_forward() -> None:
    """After a rollback to step 50: what was changed at step 100 counts from there on, and not before."""
    history = OptimizerHistory(SGD(lr=0.1), [lr(100, 0.2), Change(50, Numbers(weight_decay=0.5))])
    assert [(each.lr, each.weight_decay) for each in map(history.at, (49, 50, 100))] == [
        (0.1, 0.0),
        (0.1, 0.5),
        (0.2, 0.5),
    ]


def test_it_gives_one_object_as_long_as_nothing_changes() -> None:
    """Kernels are made for it."""
    history = OptimizerHistory(SGD(lr=warmup_cosine(0.1)), [lr(50, 0.2)])
    assert history.at(0) is history.at(49)
    assert history.at(50) is history.at(5000)
