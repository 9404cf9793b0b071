"""What cells send each other in a step: the first of each is kept, and reaches each reader once, until it is over."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from psa_store.cluster import Cell
from psa_store.consistency.relay import Address, Relay

CELL, OTHER = Cell(0, 1), Cell(1, 1)


def at(step: int, cell: Cell = CELL, microbatch: int = 0, *, backward: bool = False) -> Address:
    return Address(step, cell, microbatch, backward)


def relay_at(version: int) -> Relay[str, str]:
    relay: Relay[str, str] = Relay()
    relay.advance(version)
    return relay


def test_what_is_here_comes_at_once_and_what_comes_later_too() -> None:
    relay = relay_at(0)
    assert relay.put(at(0), "early") == ([], None)
    assert relay.want(0, CELL, "r") == [(at(0), "early")]
    assert relay.put(at(0, backward=True), "late") == (["r"], None)
    assert relay.put(at(0, OTHER), "for another") == ([], None)
    assert relay.put(at(1), "for the next step") == ([], None)


def test_the_first_one_stays_and_is_given_back_to_be_compared_with_the_second() -> None:
    relay = relay_at(0)
    relay.want(0, CELL, "r")
    relay.put(at(0), "first")
    assert relay.put(at(0), "second") == ([], "first"), "no reader gets it"
    assert relay.put(at(0), "third") == ([], "first")
    assert relay.want(0, CELL, "s") == [(at(0), "first")]
    assert len(relay) == 1


def test_a_reader_that_wants_twice_gets_all_that_is_here_again_and_the_rest_once() -> None:
    relay = relay_at(0)
    relay.put(at(0), "early")
    assert relay.want(0, CELL, "r") == relay.want(0, CELL, "r") == [(at(0), "early")]
    assert relay.put(at(0, microbatch=1), "late") == (["r"], None)


def test_all_readers_of_a_cell_get_what_comes() -> None:
    """The worker that had it, which does not know of the new plan yet, and the one that has it."""
    relay = relay_at(0)
    relay.want(0, CELL, "r")
    relay.want(0, CELL, "s")
    assert relay.put(at(0), "it") == (["r", "s"], None)


def test_a_reader_that_is_gone_gets_nothing() -> None:
    relay = relay_at(0)
    for step in (0, 1):
        relay.want(step, CELL, "r")
        relay.want(step, CELL, "s")
    relay.forget("r")
    relay.forget("it never was here")
    assert relay.put(at(0), "it") == relay.put(at(1), "it") == (["s"], None)


def test_a_step_that_is_over_is_forgotten_and_takes_nothing() -> None:
    relay = relay_at(4)
    for step in (4, 5):
        relay.want(step, CELL, "r")
        relay.put(at(step), f"of {step}")
    relay.advance(5)
    assert len(relay) == 1
    assert relay.put(at(4, microbatch=1), "too late") == ([], None)
    assert relay.want(4, CELL, "s") == []
    assert relay.want(5, CELL, "s") == [(at(5), "of 5")]
    assert relay.put(at(5, microbatch=1), "more of 5") == (["r", "s"], None)
    assert len(relay) == 2


addresses = st.builds(
    Address, st.integers(0, 4), st.builds(Cell, st.integers(0, 1), st.integers(0, 1)), st.integers(0, 2), st.booleans()
)
readers = st.sampled_from("rst")


@dataclass
class Model:
    """The same with a flat list of all that ever was sent, and nothing forgotten."""

    version: int = 0
    sent: dict[Address, str] = field(default_factory=dict)
    wants: set[tuple[int, Cell, str]] = field(default_factory=set)


@given(st.data())
def test_each_reader_is_given_the_first_of_each_and_nothing_of_another_step_or_cell(data: st.DataObject) -> None:
    relay, model = relay_at(0), Model()
    for number in range(data.draw(st.integers(0, 60))):
        match data.draw(st.sampled_from(["put", "put", "put", "want", "want", "advance", "forget"])):
            case "put":
                address, item = data.draw(addresses), f"item {number}"
                waiting, former = relay.put(address, item)
                over = address.step < model.version
                assert former == (None if over else model.sent.get(address))
                new = not over and model.sent.setdefault(address, item) is item
                key = address.step, address.cell
                expected = {reader for *wanted, reader in model.wants if tuple(wanted) == key} if new else set()
                assert sorted(waiting) == sorted(expected)
            case "want":
                asked = data.draw(addresses)
                reader = data.draw(readers)
                found = relay.want(asked.step, asked.cell, reader)
                assert dict(found) == {
                    each: item
                    for each, item in model.sent.items()
                    if each.step >= model.version and (each.step, each.cell) == (asked.step, asked.cell)
                }
                assert len(dict(found)) == len(found)
                if asked.step >= model.version:
                    model.wants.add((asked.step, asked.cell, reader))
            case "advance":
                model.version += data.draw(st.integers(0, 2))
                relay.advance(model.version)
                model.wants = {each for each in model.wants if each[0] >= model.version}
            case "forget":
                gone = data.draw(readers)
                relay.forget(gone)
                model.wants = {each for each in model.wants if each[2] != gone}
        assert len(relay) == sum(address.step >= model.version for address in model.sent)


@given(st.lists(addresses))
def test_no_more_is_kept_than_the_steps_that_are_not_over_can_send(sent: list[Address]) -> None:
    relay = relay_at(0)
    for version in range(6):
        for address in sent:
            relay.put(address, "it")
            relay.want(address.step, address.cell, "r")
        relay.advance(version)
        assert len(relay) == len({address for address in sent if address.step >= version})
    assert len(relay) == 0 and not relay._items and not relay._readers, "nor what it was kept in"
