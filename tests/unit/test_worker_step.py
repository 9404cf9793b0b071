"""A worker's part in synchronous steps, driven through its methods only."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from psa_store.consistency.worker_instructions import AskClocks, Await, Compute, Finish, Listen
from psa_store.consistency.worker_step import NEVER, Help, Reload, Show, WorkerStep

OWNERS = frozenset({"s1", "s2"})
LAST = 6


def standing(held: list[int], *, last: int | None = LAST, version: int = 0, may_miss: bool = False) -> WorkerStep:
    step = WorkerStep(last, may_miss_versions=may_miss)
    step.loaded(version)
    step.planned(held, OWNERS)
    return step


def test_all_held_ranks_are_computed_then_the_next_version_is_awaited_and_shown() -> None:
    step = standing([1, 3])
    for rank in (1, 3):
        assert step.next() == Compute(0, rank) == step.next()
        step.pushed(rank)
    assert step.next() == Await(1, OWNERS)
    assert step.next() == Listen()
    step.brought("s1", 1)
    assert step.next() == Listen()
    step.brought("s2", 1)
    assert step.next() == Show(1)
    step.loaded(1)
    assert step.next() == Compute(1, 1)


def test_a_refused_push_is_made_again_on_new_connections() -> None:
    step = standing([0])
    step.pushed(0)
    assert step.next() == Await(1, OWNERS)
    step.refused(step=0, rank=0)
    assert isinstance(step.next(), Reload)
    step.lost()
    step.loaded(0)
    assert step.next() == Compute(0, 0)


def test_a_refusal_of_an_older_step_changes_nothing() -> None:
    step = standing([0], version=2)
    step.pushed(0)
    step.refused(step=1, rank=0)
    assert step.next() == Await(3, OWNERS)


def test_without_ranks_the_last_version_is_awaited_or_for_ever() -> None:
    for last in (LAST, None):
        step = standing([], last=last)
        assert step.watches
        assert step.next() == Await(NEVER if last is None else last, OWNERS)
        assert not step.watches


def test_ranks_that_come_while_a_version_is_awaited_load_anew() -> None:
    step = standing([])
    step.next()
    step.planned([2], OWNERS)
    assert isinstance(step.next(), Reload)


def test_a_version_beyond_the_awaited_one_counts_only_where_steps_may_do_without_these_ranks() -> None:
    for may_miss in (False, True):
        step = standing([0], may_miss=may_miss)
        step.pushed(0)
        step.next()
        step.brought("s1", 3)
        step.brought("s2", 2)
        if not may_miss:
            assert isinstance(step.next(), Reload)
            continue
        assert step.next() == Await(3, ["s2"])
        step.brought("s2", 3)
        assert step.next() == Show(3)


def waiting_for_help(*, held: list[int]) -> WorkerStep:
    step = standing(held, may_miss=True)
    for rank in held:
        step.pushed(rank)
    step.next()
    step.slow()
    return step


def test_a_slow_rank_is_computed_by_the_holder_of_the_next_one() -> None:
    step = waiting_for_help(held=[1])
    assert step.next() == AskClocks(OWNERS)
    for owner in OWNERS:
        step.told(owner, [0, 1, 1])
    step.slow()
    assert step.next() == Help(0, 0) == step.next()
    step.pushed(0)
    assert step.next() == Listen()
    step.slow()
    for owner in OWNERS:
        step.told(owner, [0, 1, 1])
    assert step.next() == Listen(), "each is helped once"


def test_help_ends_when_newer_parameters_come_into_the_model() -> None:
    step = waiting_for_help(held=[1])
    for owner in OWNERS:
        step.told(owner, [0, 1, 1])
    assert step.next() == Help(0, 0)
    step.overwritten()
    assert step.next() == Listen()


@dataclass
class World:
    """Servers, and other workers, that do anything that a correct one may do."""

    step: WorkerStep
    version: int = 0
    held: list[int] = field(default_factory=list)
    awaited: int | None = None
    asked: set[str] = field(default_factory=set)
    brought: dict[str, int] = field(default_factory=dict)
    pushed: set[int] = field(default_factory=set)

    def load(self, version: int) -> None:
        self.step.lost()
        self.version, self.awaited, self.pushed = version, None, set()
        self.asked, self.brought = set(), {}
        self.step.loaded(version)


@given(st.data(), st.booleans())
def test_what_a_worker_computes_and_shows_is_always_of_the_present_version(data: st.DataObject, may_miss: bool) -> None:
    world = World(WorkerStep(LAST, may_miss_versions=may_miss))
    world.load(0)
    world.held = data.draw(st.lists(st.integers(0, 3), unique=True))
    world.step.planned(world.held, OWNERS)
    for _ in range(data.draw(st.integers(0, 60))):
        match world.step.next():
            case Compute(at, rank):
                assert at == world.version
                assert rank in world.held and rank not in world.pushed and world.awaited is None
                world.step.pushed(rank)
                world.pushed.add(rank)
            case Await(version, servers):
                assert version > world.version and world.pushed >= set(world.held)
                assert set(servers) <= OWNERS and not set(servers) & (world.asked - world.brought.keys())
                world.awaited = version
                world.asked |= set(servers)
                for server in servers:
                    world.brought.pop(server, None)
            case Show(version):
                assert world.awaited is not None and world.brought == dict.fromkeys(OWNERS, version)
                assert may_miss or version == world.awaited
                world.step.loaded(version)
                world.version, world.awaited, world.pushed = version, None, set()
                world.asked, world.brought = set(), {}
            case Reload():
                world.load(max([world.version, *world.brought.values()]))
                world.step.planned(world.held, OWNERS)
            case Finish(version):
                assert version == world.version >= LAST
                return
            case Listen():
                assert world.awaited is not None
                match data.draw(st.sampled_from(["bring", "bring", "plan", "lose", "refuse"])):
                    case "bring":
                        missing = sorted(OWNERS - world.brought.keys())
                        server = data.draw(st.sampled_from(missing)) if missing else "s1"
                        extra = data.draw(st.integers(0, 2)) if may_miss else 0
                        newest = max([min(world.awaited, LAST + 2), *world.brought.values()])
                        world.brought[server] = newest + extra
                        world.step.brought(server, newest + extra)
                    case "plan":
                        world.held = data.draw(st.lists(st.integers(0, 3), unique=True))
                        world.step.planned(world.held, OWNERS)
                    case "lose":
                        world.load(world.version)
                    case "refuse":
                        rank = data.draw(st.integers(0, 3))
                        world.step.refused(world.version, rank)
                        world.pushed.discard(rank)
            case AskClocks() | Help():
                raise AssertionError("nothing is slow")
