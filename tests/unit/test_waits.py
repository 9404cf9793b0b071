"""When a wait is said: by a clock of the test."""

from __future__ import annotations

import pytest

from psa_store.logs import Wait, Waits


class Clock:
    """Time stands still but for what the test does, and what is said is kept."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.said: list[tuple[float, str]] = []
        self.waits = Waits(lambda: self.now_s, self._say)

    def _say(self, event: str, wait: Wait) -> None:
        self.said.append((round(self.now_s - 100.0, 1), f"{event} {wait}"))

    def pass_s(self, seconds: float, what: str, why: str = "", *, say_after_s: float = 5.0) -> None:
        """Wait so long, looking five times a second."""
        for _ in range(round(seconds * 5)):
            self.waits.on("here", what, why, say_after_s=say_after_s)
            self.now_s += 0.2


@pytest.fixture
def clock() -> Clock:
    return Clock()


def times(clock: Clock) -> list[float]:
    return [at_s for at_s, _ in clock.said]


def test_a_short_wait_is_not_said(clock: Clock) -> None:
    clock.pass_s(4.8, "a server")
    clock.waits.over("here")
    assert not clock.said and clock.waits.longest() is None


def test_a_long_one_is_said_at_doubling_intervals_and_when_it_is_over(clock: Clock) -> None:
    clock.pass_s(50.0, "a server", "none is there")
    clock.waits.over("here")
    assert times(clock) == pytest.approx([5.0, 10.0, 20.0, 40.0, 50.0], abs=0.3)
    assert clock.said[0][1] == "waiting for a server: none is there" and clock.said[-1][1] == "waited for a server"


def test_a_failure_is_said_at_once(clock: Clock) -> None:
    clock.pass_s(25.0, "Redis", "out of memory", say_after_s=0.0)
    assert times(clock) == pytest.approx([0.0, 5.0, 10.0, 20.0], abs=0.3)


def test_one_that_comes_again_and_again_is_said_once_a_second(clock: Clock) -> None:
    for _ in range(20):
        clock.pass_s(0.2, "Redis", say_after_s=0.0)
        clock.waits.over("here")
    assert len(clock.said) == 4
    assert min(after - before for before, after in zip(times(clock), times(clock)[1:], strict=False)) >= 1.0


def test_where_waiting_is_usual_it_is_said_later(clock: Clock) -> None:
    clock.pass_s(70.0, "gradients", say_after_s=30.0)
    assert times(clock) == pytest.approx([30.0, 60.0], abs=0.3)


def test_something_else_is_another_wait(clock: Clock) -> None:
    clock.pass_s(4.0, "version 3")
    clock.pass_s(4.0, "version 4")
    assert not clock.said
    clock.pass_s(1.2, "version 4", "its cause is known by now")
    assert clock.said == [(9.0, "waiting for version 4: its cause is known by now")]
    clock.pass_s(0.2, "version 5")
    assert clock.said[1:] == [(9.2, "waited for version 4")]


def test_the_longest_that_was_said_is_shown(clock: Clock) -> None:
    clock.waits.on("elsewhere", "a checkpoint")
    clock.pass_s(6.0, "a server", "none is there")
    assert str(clock.waits.longest()) == "a server: none is there", "the other one was not looked at again"
    clock.waits.on("elsewhere", "a checkpoint")
    longest = clock.waits.longest()
    assert longest is not None and longest.what == "a checkpoint" and longest.lasts_s == pytest.approx(6.0)
    clock.waits.over("elsewhere")
    clock.waits.over("here")
    assert clock.waits.longest() is None
