"""A worker's part in rounds of local steps, driven through its methods only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psa_store.consistency.rounds import EndRound, Push, Rounds, Watch
from psa_store.consistency.worker_instructions import Await, Compute, Finish, Listen

OWNERS = frozenset({"s1", "s2"})


def begun(ranks: list[int], *, last: int | None = 3, steps: int = 2, overlap: bool = False, at: int = 0) -> Rounds:
    rounds = Rounds(last, steps, overlap=overlap)
    rounds.planned(OWNERS)
    rounds.term_begun(at, ranks)
    return rounds


def compute(rounds: Rounds, rank: int, steps: range) -> None:
    for step in steps:
        assert rounds.next() == Compute(step, rank)
        assert rounds.stepped(rank) == (step == steps[-1])


def bring(rounds: Rounds, version: int) -> None:
    for owner in OWNERS:
        former = rounds.have
        assert rounds.brought(owner, version) == (rounds.have != former)


def test_a_round_is_the_steps_of_each_rank_its_push_and_the_version_that_comes_of_it() -> None:
    rounds = begun([0, 2])
    for rank in (0, 2):
        compute(rounds, rank, range(2))
        assert rounds.next() == Push(rank, 0)
        rounds.pushed(rank)
    assert rounds.next() == Await(1, OWNERS)
    assert rounds.next() == Listen()
    bring(rounds, 1)
    assert rounds.next() == EndRound(0, adopt=True)
    compute(rounds, 0, range(2, 4))


def test_with_overlap_the_next_round_begins_at_once_and_its_push_waits_for_the_version() -> None:
    rounds = begun([0], overlap=True)
    compute(rounds, 0, range(2))
    assert rounds.next() == Push(0, 0)
    rounds.pushed(0)
    assert rounds.next() == Await(1, OWNERS)
    assert rounds.next() == EndRound(0, adopt=False)
    compute(rounds, 0, range(2, 4))
    assert rounds.next() == Listen()
    bring(rounds, 1)
    assert rounds.next() == Push(0, 1)


def test_lost_connections_ask_again_and_keep_what_was_computed() -> None:
    rounds = begun([0])
    compute(rounds, 0, range(2))
    rounds.pushed(0)
    assert rounds.next() == Await(1, OWNERS)
    rounds.brought("s1", 1)
    rounds.lost()
    assert rounds.next() == Await(1, OWNERS)
    rounds.brought("s2", 1)
    assert rounds.next() == Listen()
    rounds.brought("s1", 1)
    assert rounds.next() == EndRound(0, adopt=True)


def test_without_ranks_a_worker_watches_and_has_the_last_version_in_the_end() -> None:
    rounds = begun([])
    assert rounds.next() == Watch(3)
    rounds.ended()
    assert rounds.next() == Finish(3)
    rounds.pulled(3)
    assert rounds.have == 3
    assert begun([], last=None).next() == Watch(None)


@given(
    st.sets(st.integers(0, 3), min_size=1),
    st.booleans(),
    st.integers(1, 3),
    st.lists(st.sampled_from(["s1", "s2", ""])),
)
def test_each_rank_makes_every_step_and_pushes_every_round_once(
    held: set[int], overlap: bool, steps: int, happens: list[str]
) -> None:
    ranks, last = sorted(held), 4
    rounds = begun(ranks, last=last, steps=steps, overlap=overlap)
    made = dict.fromkeys(ranks, 0)
    pushed = dict.fromkeys(ranks, 0)
    asked: int | None = None
    while True:
        match rounds.next():
            case Compute(step, rank):
                assert step == made[rank]
                number = step // steps
                assert overlap or rounds.have == number, "without overlap a round begins with its version"
                made[rank] += 1
                assert rounds.stepped(rank) == (made[rank] % steps == 0), "the last of the round"
            case Push(rank, number):
                assert number == pushed[rank] and made[rank] == (number + 1) * steps
                assert not overlap or rounds.have == number
                pushed[rank] += 1
                rounds.pushed(rank)
            case Await(version, servers):
                assert servers == OWNERS
                assert set(pushed.values()) == {version} or rounds.have != version
                asked = version
            case EndRound(number, adopt):
                assert adopt is not overlap and set(pushed.values()) == {number + 1}
                assert overlap or rounds.have == number + 1
            case Listen():
                assert asked is not None and rounds.have != asked
                if not happens:
                    bring(rounds, asked)
                elif server := happens.pop():
                    rounds.brought(server, asked)
                else:
                    rounds.lost()
            case Finish(version):
                assert version == last and set(pushed.values()) == {last}
                assert set(made.values()) == {last * steps}
                return
            case Watch():
                raise AssertionError("ranks are held")
