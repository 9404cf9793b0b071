"""The checkpoint barrier while its members are killed and stopped at every step of it."""

from __future__ import annotations

from pathlib import Path

from chaos.barrier.check import check_drill
from chaos.barrier.drill import KILL_ALL, drill, schedule_of
from chaos.history import read_history
from chaos.planted import environment
from tests.harness import Site


def test_a_barrier_has_one_outcome_whichever_member_dies(site: Site, tmp_path: Path) -> None:
    seed = 0
    folder = drill(site.zookeeper, "drill", tmp_path, seed, schedule_of(seed))
    history = read_history(folder)
    assert check_drill(history) == []
    outcomes = {event["state"] for event in history.of("outcome")}
    assert outcomes == {"done", "aborted"}


def test_a_double_barrier_is_caught(site: Site, tmp_path: Path) -> None:
    folder = drill(site.zookeeper, "double", tmp_path, 0, [KILL_ALL], environment("double_barrier"))
    found = [each.message for each in check_drill(read_history(folder))]
    assert any("passed barrier" in message for message in found), found
