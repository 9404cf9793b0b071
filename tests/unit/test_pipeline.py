"""The order of passes of one rank: alone, and with several workers that hold its stages and may die at any moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_store.cluster import Cell
from psa_store.consistency.pipeline import Backward, Forward, Pipeline
from psa_store.consistency.relay import Address, Relay
from psa_store.consistency.residence import Residence, next_residence

STEP, RANK = 7, 3
sizes = st.integers(1, 5)


def carried_out(pipeline: Pipeline) -> list[Forward | Backward]:
    """What it says until it says no more, each carried out at once; stages here send each other what they need."""
    found = []
    held = pipeline.held
    while (due := pipeline.next()) is not None:
        pipeline.done(due)
        found.append(due)
        backward = isinstance(due, Backward)
        to = due.stage + (-1 if backward else 1)
        if to in held:
            pipeline.arrived(to, due.microbatch, backward=backward)
    return found


def test_one_stage_goes_forward_and_backward_with_each_micro_batch() -> None:
    pipeline = Pipeline(1, 2)
    assert pipeline.finished and pipeline.next() is None, "nothing is held"
    pipeline.hold([0])
    assert not pipeline.finished
    assert carried_out(pipeline) == [Forward(0, 0), Backward(0, 0), Forward(0, 1), Backward(0, 1)]
    assert pipeline.finished


def test_the_first_of_two_stages_is_one_micro_batch_ahead() -> None:
    pipeline = Pipeline(2, 3)
    pipeline.hold([0])
    assert carried_out(pipeline) == [Forward(0, 0), Forward(0, 1)]
    pipeline.arrived(0, 0, backward=True)
    assert carried_out(pipeline) == [Backward(0, 0), Forward(0, 2)]
    pipeline.arrived(0, 2, backward=True)
    assert pipeline.next() is None, "gradients add up in the order of micro-batches"
    pipeline.arrived(0, 1, backward=True)
    assert carried_out(pipeline) == [Backward(0, 1), Backward(0, 2)]
    assert pipeline.finished


def test_what_is_for_a_stage_elsewhere_is_passed_over() -> None:
    pipeline = Pipeline(3, 1)
    pipeline.hold([1])
    pipeline.arrived(2, 0, backward=False)
    pipeline.arrived(0, 0, backward=True)
    assert pipeline.next() is None
    pipeline.hold([1, 2])
    assert pipeline.next() is None, "a stage begins without anything, and is sent all that there is"


def test_a_stage_that_comes_begins_from_its_beginning_and_the_others_go_on() -> None:
    pipeline = Pipeline(2, 2)
    pipeline.hold([0])
    assert carried_out(pipeline) == [Forward(0, 0), Forward(0, 1)]
    pipeline.hold([0, 1])
    for microbatch in range(2):
        pipeline.arrived(1, microbatch, backward=False)
    assert carried_out(pipeline) == [
        Forward(1, 0),
        Backward(1, 0),
        Forward(1, 1),
        Backward(1, 1),
        Backward(0, 0),
        Backward(0, 1),
    ]
    pipeline.hold([1])
    assert pipeline.finished
    pipeline.hold([0, 1])
    assert pipeline.next() == Forward(0, 0), "one that has been elsewhere meanwhile is new again"


@given(sizes, sizes)
def test_all_stages_in_one_worker_need_no_other(stages: int, microbatches: int) -> None:
    pipeline = Pipeline(stages, microbatches)
    pipeline.hold(range(stages))
    made = carried_out(pipeline)
    assert pipeline.finished
    assert Counter(made) == Counter(
        each(stage, microbatch)
        for each in (Forward, Backward)
        for stage in range(stages)
        for microbatch in range(microbatches)
    )


# --- fewer stages in memory than are computed


def test_stages_are_in_memory_in_groups_upwards_and_then_downwards() -> None:
    forwarded: set[int] = set()
    left, found = [0, 1, 2, 4, 5], []
    while left:
        found.append(next_residence(left, forwarded, 2))
        if found[-1].backward:
            left = [stage for stage in left if stage not in found[-1].stages]
        else:
            forwarded.update(found[-1].stages)
    up, down = [Residence((0,), False), Residence((1, 2), False)], [Residence((1, 2), True), Residence((0,), True)]
    assert found == [*up, Residence((4, 5), True), *down]


def test_a_stage_that_goes_makes_its_forward_passes_once_more() -> None:
    pipeline = Pipeline(2, 2, resident_max=1)
    pipeline.hold([0, 1])
    assert carried_out(pipeline) == [], "nothing is in memory"
    assert pipeline.residence_due == Residence((0,), backward=False)
    pipeline.reside(Residence((0,), backward=False))
    assert carried_out(pipeline) == [Forward(0, 0), Forward(0, 1)]
    pipeline.reside(Residence((1,), backward=True))
    assert carried_out(pipeline) == [Forward(1, 0), Backward(1, 0), Forward(1, 1), Backward(1, 1)]
    assert pipeline.whole == (1,)
    pipeline.reside(Residence((0,), backward=True))
    assert carried_out(pipeline) == [Forward(0, 0), Backward(0, 0), Forward(0, 1), Backward(0, 1)]
    assert pipeline.finished and pipeline.residence_due is None


def test_a_stage_goes_on_without_room_where_a_later_one_needs_all_activations_first() -> None:
    pipeline = Pipeline(2, 4)
    pipeline.hold([0])
    assert carried_out(pipeline) == [Forward(0, 0), Forward(0, 1)]
    pipeline.runs_ahead(0)
    assert carried_out(pipeline) == [Forward(0, 2), Forward(0, 3)]


# --- several workers


@dataclass
class Holder:
    """A worker as it computes one rank, and what it checks of each pass."""

    scene: Scene
    name: str
    resident_max: int | None
    pipeline: Pipeline = field(init=False)
    inbox: list[Address] = field(default_factory=list)
    here: set[tuple[int, int, bool]] = field(default_factory=set)
    """What has arrived, by the stage that it is for, micro-batch and direction."""
    forwards: Counter[int] = field(default_factory=Counter)
    backwards: Counter[int] = field(default_factory=Counter)
    resident: Residence = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.pipeline = Pipeline(self.scene.stages, self.scene.microbatches, resident_max=self.resident_max)
        self.resident = Residence((), backward=True)

    def hold(self, stages: Sequence[int]) -> None:
        if self.resident_max is not None and tuple(stages) != self.pipeline.held:
            self.begin()  # as the worker does
        for stage in set(stages) - set(self.pipeline.held):
            self.forwards[stage] = self.backwards[stage] = 0
            self.here = {key for key in self.here if key[0] != stage}
        new = set(stages) - set(self.pipeline.held)
        self.pipeline.hold(stages)
        for stage in sorted(new):
            found = self.scene.relay.want(STEP, Cell(RANK, stage), self.name)
            self.inbox += [address for address, _ in found]

    def take(self, place: int) -> None:
        """Something arrives, in any order, perhaps not for the first time."""
        address = self.inbox.pop(place)
        if address.microbatch >= self.scene.microbatches:
            self.pipeline.runs_ahead(address.cell.stage)
            return
        key = address.cell.stage, address.microbatch, address.backward
        if key[0] in self.pipeline.held:
            self.here.add(key)
        self.pipeline.arrived(address.cell.stage, address.microbatch, backward=address.backward)

    def turn(self) -> bool:
        """Make one pass; False if there is none to make."""
        due = self.pipeline.next()
        assert due == self.pipeline.next(), "to ask changes nothing"
        if due is None:
            return self.reside()
        stage, microbatch, last = due.stage, due.microbatch, self.scene.stages - 1
        assert stage in self.pipeline.held
        assert self.resident_max is None or stage in self.resident.stages, "it is in memory"
        if isinstance(due, Forward):
            assert microbatch == self.forwards[stage], "forward passes are made once, in order"
            assert stage == 0 or (stage, microbatch, False) in self.here, "a stage needs what the one before returned"
            self.forwards[stage] += 1
            in_flight = self.forwards[stage] - self.backwards[stage]
            if not self.scene.has_residents:
                assert in_flight <= self.scene.stages - stage, "no stage keeps more activations"
            to = stage + 1
        else:
            assert microbatch == self.backwards[stage] < self.forwards[stage]
            assert self.resident_max is None or self.resident.backward, "its graph is kept"
            assert stage == last or (stage, microbatch, True) in self.here, "a stage needs its gradients"
            self.backwards[stage] += 1
            to = stage - 1
        self.pipeline.done(due)
        if 0 <= to <= last:
            self.scene.send(Address(STEP, Cell(RANK, to), microbatch, isinstance(due, Backward)))
        return True

    def reside(self) -> bool:
        """Have other stages in memory, if they are due."""
        due = self.pipeline.residence_due
        if due is None:
            return False
        assert self.resident_max is not None and 1 <= len(due.stages) <= self.resident_max
        assert set(self.pipeline.held).issuperset(due.stages) and due != self.resident
        self.resident = due
        self.pipeline.reside(due)
        for stage in due.stages:
            self.forwards[stage] = 0
        if not due.backward:
            latest = due.stages[-1]
            for stage in set(range(latest)) - set(self.pipeline.held):
                self.scene.send(Address(STEP, Cell(RANK, stage), self.scene.microbatches + latest, backward=True))
        return True


class Scene:
    """A relay, and the workers that hold the stages of a rank."""

    def __init__(
        self,
        stages: int,
        microbatches: int,
        holders: Sequence[str],
        resident_max: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """``resident_max``: how many stages these workers can have in memory at once; the others, all."""
        self.stages, self.microbatches = stages, microbatches
        self.has_residents, self._resident_max = bool(resident_max), resident_max
        self.relay: Relay[object, str] = Relay()
        self.workers = {name: self.holder(name) for name in set(holders)}
        self.holders = list(holders)
        self.replan()

    def holder(self, name: str) -> Holder:
        return Holder(self, name, self._resident_max.get(name))

    def replan(self) -> None:
        for name, worker in self.workers.items():
            worker.hold([stage for stage, holder in enumerate(self.holders) if holder == name])

    def send(self, address: Address) -> None:
        readers, _ = self.relay.put(address, object())
        for reader in readers:
            self.workers[reader].inbox.append(address)

    def kill(self, name: str, heirs: Sequence[str]) -> None:
        """A worker ends; others get its stages."""
        del self.workers[name]
        self.relay.forget(name)
        for stage, holder in enumerate(self.holders):
            if holder == name:
                heir = heirs[stage % len(heirs)]
                self.workers.setdefault(heir, self.holder(heir))
                self.holders[stage] = heir
        self.replan()

    def run(self) -> None:
        """Let all go on for as long as any can."""
        moved = True
        while moved:
            moved = False
            for worker in list(self.workers.values()):
                while worker.inbox:
                    worker.take(0)
                while worker.turn():
                    moved = True


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    stages = draw(sizes)
    holders = draw(st.lists(st.sampled_from("abcd"), min_size=stages, max_size=stages))
    resident_max = draw(st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 3)))
    return Scene(stages, draw(sizes), holders, resident_max)


@settings(max_examples=250)
@given(scenes(), st.data())
def test_whichever_workers_hold_the_stages_and_die_all_passes_are_made(scene: Scene, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(0, 60))):
        worker = scene.workers[data.draw(st.sampled_from(sorted(scene.workers)))]
        match data.draw(st.sampled_from(["turn", "turn", "arrive", "arrive", "again", "die"])):
            case "turn":
                worker.turn()
            case "arrive" if worker.inbox:
                worker.take(data.draw(st.integers(0, len(worker.inbox) - 1)))
            case "again" if worker.here:
                stage, microbatch, backward = data.draw(st.sampled_from(sorted(worker.here)))
                worker.pipeline.arrived(stage, microbatch, backward=backward)
            case "die":
                others = sorted({*scene.workers, *"efg"} - {worker.name})
                scene.kill(worker.name, data.draw(st.lists(st.sampled_from(others), min_size=1, max_size=3)))
            case _:
                pass
    scene.run()
    for name, worker in scene.workers.items():
        assert worker.pipeline.finished, f"{name} waits for what does not come"
        for stage in worker.pipeline.held:
            assert worker.forwards[stage] == worker.backwards[stage] == scene.microbatches
    assert sorted(stage for worker in scene.workers.values() for stage in worker.pipeline.held) == list(
        range(scene.stages)
    )


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_worker_that_takes_all_stages_of_the_dead_ones_gets_what_was_sent_to_them(microbatches: int) -> None:
    scene = Scene(3, microbatches, "abc")
    scene.run()
    for name in "ab":
        scene.kill(name, ["c"])
    scene.run()
    assert list(scene.workers) == ["c"] and scene.workers["c"].pipeline.finished
    assert scene.workers["c"].pipeline.held == (0, 1, 2)
