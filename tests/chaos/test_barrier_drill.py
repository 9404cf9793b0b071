"""The checkpoint barrier while its members are killed and stopped at every step of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.barrier.check import check_drill
from chaos.barrier.drill import KILL_ALL, drill, schedule_of
from chaos.history import read_history
from chaos.planted import environment
from psa_store.launch import PrivateZooKeeper


@pytest.fixture(scope="module")
def zookeeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateZooKeeper]:
    private = PrivateZooKeeper(tmp_path_factory.mktemp("zookeeper"))
    private.start(120)
    yield private
    private.stop()


def test_a_barrier_has_one_outcome_whichever_member_dies(zookeeper: PrivateZooKeeper, tmp_path: Path) -> None:
    seed = 0
    folder = drill(zookeeper.hosts, "drill", tmp_path, seed, schedule_of(seed))
    history = read_history(folder)
    assert check_drill(history) == []
    # Whether one is given up as well depends on where members are when faults are injected.
    assert "done" in {event["state"] for event in history.of("outcome")}


def test_a_double_barrier_is_caught(zookeeper: PrivateZooKeeper, tmp_path: Path) -> None:
    folder = drill(zookeeper.hosts, "double", tmp_path, 0, [KILL_ALL], environment("double_barrier"))
    found = [each.message for each in check_drill(read_history(folder))]
    assert any("passed barrier" in message for message in found), found
