"""The decision about a checkpoint barrier: once, and only for all of its members."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psa_store.coordination import Barrier, BarrierState

OPEN, DONE, ABORTED = BarrierState
NAMES = ["a", "b", "c"]
barriers = st.builds(Barrier, st.integers(1, 3), st.lists(st.sampled_from(NAMES), min_size=1, unique=True).map(tuple))
arrivals = st.dictionaries(st.sampled_from([*NAMES, "stranger"]), st.integers(0, 9))
gone = st.sets(st.sampled_from(NAMES))


@given(barriers, arrivals, st.integers(0, 4), gone, st.booleans())
def test_it_is_done_exactly_when_all_have_arrived_in_its_term(
    barrier: Barrier, arrived: dict[str, int], term: int, lost: set[str], expired: bool
) -> None:
    after = barrier.decided(arrived, term=term, gone=lost, expired=expired)
    complete = set(barrier.members) <= arrived.keys()
    assert (after.state is DONE) == (complete and term <= barrier.term)
    if after.state is DONE:
        assert after.versions == {member: arrived[member] for member in barrier.members}
    hopeless = term > barrier.term or (not complete and bool(expired or set(barrier.members) - arrived.keys() & lost))
    if after.state is ABORTED:
        assert after.reason and hopeless
    if after.state is OPEN:
        assert after is barrier and not expired


@given(barriers, st.lists(st.tuples(arrivals, st.integers(0, 4), gone, st.booleans())))
def test_it_is_decided_once(barrier: Barrier, looks: list[tuple[dict[str, int], int, set[str], bool]]) -> None:
    seen = [barrier]
    for arrived, term, lost, expired in looks:
        seen.append(seen[-1].decided(arrived, term=term, gone=lost, expired=expired))
    decisions = {(each.state, each.reason, tuple(each.versions.items())) for each in seen if each.state is not OPEN}
    assert len(decisions) <= 1
    assert all((each.term, each.members) == (barrier.term, barrier.members) for each in seen)


def test_a_reason_names_the_members_that_are_missing_or_gone() -> None:
    barrier = Barrier(1, ("a", "b"))
    assert "missing: b" in barrier.decided({"a": 1}, term=1, expired=True).reason
    assert "b" in barrier.decided({"a": 1}, term=1, gone=["b", "a"]).reason
    assert "term 2" in barrier.decided({"a": 1, "b": 1}, term=2).reason
