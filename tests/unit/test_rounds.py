"""A worker's part in rounds of local steps, driven through events and instructions only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psa_store.consistency.rounds import (
    Ask,
    Brought,
    Compute,
    Ended,
    EndRound,
    Finish,
    Listen,
    Lost,
    Planned,
    Pulled,
    Push,
    Pushed,
    Rounds,
    Stepped,
    TermBegun,
    Watch,
)

OWNERS = frozenset({"s1", "s2"})


def begun(ranks: list[int], *, last: int | None = 3, steps: int = 2, overlap: bool = False, at: int = 0) -> Rounds:
    rounds = Rounds(last, steps, overlap=overlap)
    rounds.handle(Planned(OWNERS))
    rounds.handle(TermBegun(at, ranks))
    return rounds


def compute(rounds: Rounds, rank: int, steps: range) -> None:
    for step in steps:
        turn = rounds.next()
        assert turn == Compute(step, rank, first=step == steps[0], last=step == steps[-1])
        rounds.handle(Stepped(rank))


def bring(rounds: Rounds, version: int) -> None:
    for owner in OWNERS:
        rounds.handle(Brought(owner, version))


def test_a_round_is_the_steps_of_each_rank_its_push_and_the_version_that_comes_of_it() -> None:
    rounds = begun([0, 2])
    for rank in (0, 2):
        compute(rounds, rank, range(2))
        assert rounds.next() == Push(rank, 0)
        rounds.handle(Pushed(rank))
    assert rounds.next() == Ask(1)
    assert rounds.next() == Listen()
    bring(rounds, 1)
    assert rounds.next() == EndRound(0, adopt=True)
    compute(rounds, 0, range(2, 4))


def test_with_overlap_the_next_round_begins_at_once_and_its_push_waits_for_the_version() -> None:
    rounds = begun([0], overlap=True)
    compute(rounds, 0, range(2))
    assert rounds.next() == Push(0, 0)
    rounds.handle(Pushed(0))
    assert rounds.next() == Ask(1)
    assert rounds.next() == EndRound(0, adopt=False)
    compute(rounds, 0, range(2, 4))
    assert rounds.next() == Listen()
    bring(rounds, 1)
    assert rounds.next() == Push(0, 1)


def test_lost_connections_ask_again_and_keep_what_was_computed() -> None:
    rounds = begun([0])
    compute(rounds, 0, range(2))
    rounds.handle(Pushed(0))
    assert rounds.next() == Ask(1)
    rounds.handle(Brought("s1", 1))
    rounds.handle(Lost())
    assert rounds.next() == Ask(1)
    rounds.handle(Brought("s2", 1))
    assert rounds.next() == Listen()
    rounds.handle(Brought("s1", 1))
    assert rounds.next() == EndRound(0, adopt=True)


def test_without_ranks_a_worker_watches_and_has_the_last_version_in_the_end() -> None:
    rounds = begun([])
    assert rounds.next() == Watch(3)
    rounds.handle(Ended())
    assert rounds.next() == Finish(3)
    rounds.handle(Pulled(3))
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
            case Compute(step, rank, first, last_of_round):
                assert (
                    step == made[rank] and first == (step % steps == 0) and last_of_round == ((step + 1) % steps == 0)
                )
                number = step // steps
                assert overlap or rounds.have == number, "without overlap a round begins with its version"
                made[rank] += 1
                rounds.handle(Stepped(rank))
            case Push(rank, number):
                assert number == pushed[rank] and made[rank] == (number + 1) * steps
                assert not overlap or rounds.have == number
                pushed[rank] += 1
                rounds.handle(Pushed(rank))
            case Ask(version):
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
                    rounds.handle(Brought(server, asked))
                else:
                    rounds.handle(Lost())
            case Finish(version):
                assert version == last and set(pushed.values()) == {last}
                assert set(made.values()) == {last * steps}
                return
            case Watch():
                raise AssertionError("ranks are held")
