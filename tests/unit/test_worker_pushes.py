"""Pushes that are applied on arrival, as a worker sees them: driven through its methods only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psa_store.consistency.worker_instructions import AskClocks, Compute, Finish, Listen
from psa_store.consistency.worker_pushes import Bring, Drop, Forget, PushAgain, WorkerPushes

OWNERS = frozenset({"s1", "s2"})
RANKS = 3


def tell(pushes: WorkerPushes, version: int, applied: list[int], committed: list[int]) -> list[Drop | Forget]:
    return [each for owner in sorted(OWNERS) for each in pushes.told(owner, version, applied, committed)]


def begun(held: list[int], *, last: int | None = 5, window: int = 3) -> WorkerPushes:
    pushes = WorkerPushes(last, window)
    pushes.term_begun(OWNERS)
    pushes.planned(held)
    assert not held or pushes.next() == AskClocks(OWNERS)
    pushes.asked()
    tell(pushes, 0, [0] * RANKS, [0] * RANKS)
    pushes.started()
    return pushes


def push(pushes: WorkerPushes, rank: int, step: int) -> None:
    assert pushes.next() == Bring(rank, step)
    pushes.here(rank, step)
    assert pushes.next() == Compute(step, rank)
    pushes.pushed(rank)


def test_the_rank_that_is_behind_comes_first_and_another_is_tried_if_its_parameters_do_not_come() -> None:
    pushes = begun([0, 2])
    push(pushes, 0, 0)
    push(pushes, 2, 0)
    assert pushes.next() == Bring(0, 1)
    pushes.not_here(0)
    assert pushes.next() == Bring(2, 1)
    pushes.not_here(2)
    assert pushes.next() == Bring(0, 1), "all were tried: begin again"


def test_a_rank_waits_when_its_window_is_full_until_its_pushes_are_durable() -> None:
    pushes = begun([0], window=2)
    push(pushes, 0, 0)
    push(pushes, 0, 1)
    assert pushes.next() == Listen()
    assert tell(pushes, 1, [2, 0, 0], [1, 0, 0]) == [Drop(0, 0, durable=True)]
    assert pushes.next() == Bring(0, 2)


def test_a_push_is_kept_while_one_server_has_committed_the_version_without_it() -> None:
    """Shards of one version may hold the pushes of different ranks."""
    pushes = begun([0])
    push(pushes, 0, 0)
    assert pushes.told("s1", 1, [1, 1, 0], [1, 0, 0]) == []
    assert pushes.told("s2", 1, [1, 1, 0], [0, 1, 0]) == []
    assert tell(pushes, 2, [1, 1, 0], [1, 1, 0]) == [Drop(0, 0, durable=True)]


def test_what_servers_lack_at_the_beginning_of_a_term_is_pushed_again_in_order() -> None:
    pushes = begun([0])
    for step in range(3):
        push(pushes, 0, step)
    pushes.lost()
    pushes.term_begun(OWNERS)
    pushes.asked()
    tell(pushes, 1, [1, 0, 0], [1, 0, 0])
    pushes.planned([0])
    assert pushes.compared() == []
    assert pushes.to_push_again() == {0: (1, 2)}
    for step in (1, 2):
        assert pushes.next() == Bring(0, step)
        pushes.here(0, step)
        assert pushes.next() == PushAgain(0, step)
        pushes.pushed(0)
    assert pushes.next() == Bring(0, 3)


def test_a_rank_that_others_held_meanwhile_goes_on_where_servers_are() -> None:
    pushes = begun([0])
    push(pushes, 0, 0)
    pushes.term_begun(OWNERS)
    pushes.asked()
    tell(pushes, 2, [3, 0, 0], [0, 0, 0])
    assert pushes.compared() == [Forget(0), Drop(0, 0, durable=False)]
    assert pushes.next() == Bring(0, 3)


def test_a_rank_that_goes_takes_its_pushes_along() -> None:
    pushes = begun([0, 1])
    push(pushes, 0, 0)
    assert pushes.planned([1]) == [Forget(0), Drop(0, 0, durable=False)]
    assert pushes.next() == Bring(1, 0)
    assert begun([]).next() == Finish(5) and begun([], last=None).next() == Listen()


@given(st.lists(st.sampled_from(["", "late", "death"]), max_size=40), st.integers(1, 3))
def test_each_step_is_pushed_in_order_and_kept_until_it_is_durable_in_the_end(happens: list[str], window: int) -> None:
    last = 6
    pushes = begun([0], last=last, window=window)
    applied = committed = version = 0
    kept: set[int] = set()

    def note(each: list[Drop | Forget]) -> None:
        for drop in each:
            assert isinstance(drop, Drop) and drop.durable and drop.step < committed
            kept.remove(drop.step)

    while True:
        happening = happens.pop() if happens else ""
        match pushes.next():
            case Bring(rank, step):
                assert step == applied
                if happening == "late":
                    pushes.not_here(rank)
                else:
                    pushes.here(rank, step)
            case Compute(step, rank):
                assert step == applied and len(kept) < window
                kept.add(step)
                applied += 1
                pushes.pushed(rank)
            case PushAgain(rank, step):
                assert step == applied and step in kept
                applied += 1
                pushes.pushed(rank)
            case Listen():
                assert len(kept) == window
                version, committed = version + 1, applied
                note(tell(pushes, version, [applied, 0, 0], [committed, 0, 0]))
            case Finish():
                break
            case AskClocks():
                raise AssertionError("all ranks are known")
        if happening == "death":  # the servers die, and begin again from their last commit
            applied = committed
            pushes.lost()
            pushes.term_begun(OWNERS)
            pushes.asked()
            note(tell(pushes, version, [applied, 0, 0], [committed, 0, 0]))
            pushes.planned([0])
            note(pushes.compared())
    assert applied == last
    version, committed = version + 1, applied
    note(tell(pushes, version, [applied, 0, 0], [committed, 0, 0]))
    assert not kept
