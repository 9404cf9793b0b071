"""The checker of pushes that are applied on arrival: it passes a right history, and finds what is wrong in others."""

from __future__ import annotations

from typing import Any

import pytest

from chaos.check.arrival import check_arrivals
from chaos.history import Event, History


class Story:
    """One shard, two ranks; a server dies, and what it had not committed is pushed again."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.serve(1, [0, 0])
        self.update(1, 0, 0)
        self.update(1, 1, 0)
        self.update(1, 0, 1)
        self.tell("settled", rank=0, step=0)
        self.serve(2, [1, 1])
        self.update(2, 0, 1)

    def tell(self, event: str, **fields: Any) -> None:
        self.events.append(Event(float(len(self.events)), event, "server", "s", 1, fields))

    def serve(self, term: int, clocks: list[int]) -> None:
        self.tell("serving", term=term, clocks={"0": clocks})

    def update(self, term: int, rank: int, step: int) -> None:
        self.tell("updated", term=term, shard=0, rank=rank, step=step)

    def found(self) -> list[str]:
        return [violation.message for violation in check_arrivals(History(self.events))]


def test_a_push_that_is_applied_again_in_the_next_term_is_right() -> None:
    assert Story().found() == []


@pytest.mark.parametrize(("step", "what"), [(1, "twice"), (3, "after a gap")])
def test_a_push_that_counts_twice_or_is_left_out_is_seen(step: int, what: str) -> None:
    story = Story()
    story.update(2, 0, step)
    assert story.found() == [f"shard 0 took push {step} of rank 0 after [2, 1]"], what


def test_an_acknowledged_push_that_is_lost_is_seen() -> None:
    story = Story()
    story.tell("settled", rank=0, step=1)
    story.serve(3, [1, 1])
    assert story.found() == ["term 3 lost push 1 of rank 0"]
