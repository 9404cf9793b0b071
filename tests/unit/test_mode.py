"""Modes as text: what is written is read again, and what is not understood is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.errors import UsageError
from psa_store.job.mode import SYNC, Mode, ModeName, parse_mode

modes = st.one_of(
    st.just(SYNC),
    st.builds(Mode, st.just(ModeName.SYNC), backup=st.integers(0, 5)),
    st.builds(Mode, st.just(ModeName.SYNC), speculate=st.booleans()),
    st.just(Mode(ModeName.ASYNC)),
    st.builds(Mode, st.just(ModeName.SSP), staleness=st.integers(0, 9)),
    st.builds(
        lambda fragments, length, **others: Mode(
            ModeName.LOCAL, fragments=fragments, steps=fragments * length, **others
        ),
        st.integers(1, 5),
        st.integers(1, 9),
        overlap=st.booleans(),
        forget=st.booleans(),
        lr=st.floats(0, 99),
        momentum=st.floats(0, 0.99),
    ),
)


@given(modes)
def test_a_mode_is_read_as_it_was_written(mode: Mode) -> None:
    assert parse_mode(str(mode)) == mode


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "there is no ''"),
        ("bsp", "there is no 'bsp'"),
        ("sync:staleness=1", "'staleness' is not known here"),
        ("async:backup=1", "takes no options"),
        ("sync:backup=1,backup=2", "given twice"),
        ("sync:speculate=1", "speculate takes no value"),
        ("sync:backup", "backup needs a value"),
        ("sync:backup=-1", "backup must be a whole number"),
        ("sync:backup=1,speculate", "needs no speculation"),
        ("ssp", "give ssp its staleness"),
        ("ssp:staleness=two", "staleness must be a whole number"),
        ("local", "give local its steps"),
        ("local:steps=0", "at least 1"),
        ("local:steps=20,fragments=3", "cannot be shared out evenly"),
        ("local:steps=20,momentum=1", "momentum must be a number from 0 to below 1"),
        ("local:steps=20,lr=nan", "lr must be a number"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_mode(text)
    assert why in str(refused.value)


@given(st.integers(1, 6), st.integers(0, 50), st.integers(0, 50))
def test_each_shard_is_exchanged_once_in_all_fragments(fragments: int, shard: int, version: int) -> None:
    mode = Mode(ModeName.LOCAL, steps=fragments, fragments=fragments)
    assert sum(mode.exchanges(shard, version + i) for i in range(fragments)) == 1


def test_servers_keep_the_groups_of_the_jobs_optimizer() -> None:
    optimizer = {"name": "AdamW", "groups": [{"select": "matrices", "weight_decay": 0.1}]}
    outer = parse_mode("local:steps=20,lr=0.5,momentum=0").server_optimizer(optimizer)
    assert outer["name"] == "SGD" and outer["lr"] == 0.5 and outer["nesterov"] is False
    assert outer["groups"] == [{"select": "matrices", "lr_scale": 1.0}]
    assert SYNC.server_optimizer(optimizer) is optimizer
