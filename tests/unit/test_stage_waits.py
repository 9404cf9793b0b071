"""For which stages of other workers a worker waits, and how it counts the time."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from psa_store.cluster import Cell
from psa_store.consistency.pipeline import Backward, Forward, Pipeline
from psa_store.observe.health import COMPUTING, WAITING
from psa_store.worker import health
from psa_store.worker.batches import RankStep
from psa_store.worker.health import Progress


def holding(*stages: int, of: int = 3, microbatches: int = 2) -> Pipeline:
    pipeline = Pipeline(of, microbatches)
    pipeline.hold(stages)
    return pipeline


def go_on(pipeline: Pipeline) -> list[Forward | Backward]:
    """Make all passes that can be made, as a worker does; a stage here gets what the one beside it made."""
    made = []
    while (due := pipeline.next()) is not None:
        assert pipeline.waits_for == (), "there is something to do"
        pipeline.done(due)
        backward = isinstance(due, Backward)
        pipeline.arrived(due.stage + (-1 if backward else 1), due.microbatch, backward=backward)
        made.append(due)
    return made


class TestPipeline:
    def test_a_stage_waits_for_the_one_before_and_then_for_the_one_after(self) -> None:
        pipeline = holding(1)
        assert pipeline.waits_for == (0,)
        pipeline.arrived(1, 0, backward=False)
        go_on(pipeline)
        assert pipeline.waits_for == (0, 2), "either lets it go on"
        pipeline.arrived(1, 1, backward=False)
        go_on(pipeline)
        assert pipeline.waits_for == (2,)

    def test_without_room_for_activations_it_does_not_wait_for_the_one_before(self) -> None:
        pipeline = holding(1, microbatches=9)
        for microbatch in (0, 1):
            pipeline.arrived(1, microbatch, backward=False)
        assert len(go_on(pipeline)) == 2 and pipeline.waits_for == (2,)

    def test_stages_here_are_not_waited_for(self) -> None:
        pipeline = holding(0, 1)
        go_on(pipeline)
        assert pipeline.waits_for == (2,)
        assert holding(1, 2).waits_for == (0,)
        everything = holding(0, 1, 2)
        assert len(go_on(everything)) == 12 and everything.finished and everything.waits_for == ()

    def test_with_gaps_it_may_wait_for_several(self) -> None:
        pipeline = holding(0, 2, of=4)
        go_on(pipeline)
        assert pipeline.waits_for == (1,), "stage 2 has nothing that could go backward"
        pipeline.arrived(2, 0, backward=False)
        go_on(pipeline)
        assert pipeline.waits_for == (1, 3)

    def test_at_its_end_it_waits_for_stages_that_share_parameters_with_it(self) -> None:
        pipeline = Pipeline(3, 1, {0: (2,)})
        pipeline.hold([0])
        go_on(pipeline)
        pipeline.arrived(0, 0, backward=True)
        go_on(pipeline)
        assert not pipeline.finished and pipeline.waits_for == (2,)
        pipeline.tied(0, 2)
        assert pipeline.finished and pipeline.waits_for == ()

    def test_once_finished_it_waits_for_none(self) -> None:
        pipeline = holding(2)
        for microbatch in (0, 1):
            pipeline.arrived(2, microbatch, backward=False)
        go_on(pipeline)
        assert pipeline.finished and pipeline.waits_for == ()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: now[0]))
    yield now


class TestProgress:
    def test_waiting_in_the_middle_of_a_step_is_no_computing(self, clock: list[float]) -> None:
        progress, other = Progress(), [Cell(0, 1)]
        progress.begin(RankStep(5, 0))
        clock[0] += 1.0
        progress.wait_for(other)
        assert progress.stage == WAITING and progress.awaited == other
        clock[0] += 2.0
        progress.wait_for(other)
        assert progress.since_s == 101.0, "it still waits, however often it looks"
        clock[0] += 2.0
        progress.wait_for([])
        assert progress.stage == COMPUTING and not progress.awaited
        clock[0] += 3.0
        progress.end(0, 8, 0.5)
        clock[0] += 1.5
        progress.begin(RankStep(6, 0))
        assert (progress.compute_s, progress.wait_s) == (4.0, 5.5)
        assert (progress.steps, progress.samples, progress.loss) == (1, 8, 0.5)

    def test_passes_that_are_given_up_end_a_wait(self, clock: list[float]) -> None:
        progress = Progress()
        progress.begin(RankStep(5, 0))
        progress.wait_for([Cell(0, 1)])
        clock[0] += 2.0
        progress.end(0, None, None)
        assert progress.stage == WAITING and not progress.awaited
        assert (progress.compute_s, progress.wait_s) == (0.0, 2.0)

    def test_a_rank_whose_loss_is_elsewhere_adds_no_samples_and_hides_no_loss(self, clock: list[float]) -> None:
        progress = Progress()
        for rank, samples, loss in ((0, 8, 0.5), (1, None, None)):
            progress.begin(RankStep(5, rank))
            progress.end(rank, samples, loss)
        assert (progress.steps, progress.samples, progress.loss) == (2, 8, 0.5)

    def test_a_rank_whose_last_stage_has_gone_has_no_loss_here_any_more(self, clock: list[float]) -> None:
        progress = Progress()
        for step, samples, loss in ((5, 8, 0.5), (6, None, None)):
            progress.begin(RankStep(step, 0))
            progress.end(0, samples, loss)
        assert (progress.steps, progress.samples, progress.loss) == (2, 8, None)
