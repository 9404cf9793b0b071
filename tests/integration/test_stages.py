"""What a job with stages refuses, by name; and what a worker with stages gives its script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import psa_store as psa
from psa_store.errors import JobMismatch, UsageError
from psa_store.job.sampling import sample_indices
from tests.harness import Run, Servers, Site
from tests.performance import stages as memory

WIDTH = 6


class Part(nn.Module):
    """A layer under the name that it has in the whole model; the last one makes the loss."""

    def __init__(self, name: str, is_last: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.name, self.is_last = name, is_last

    def forward(self, carry: Any, microbatch: Tensor) -> Any:
        out = self.get_submodule(self.name)(microbatch if carry is None else carry)
        return out.square().mean() if self.is_last else out


STAGES = [partial(Part, "front", False), partial(Part, "back", True)]
DATA = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(32)]


def train(job: str, stages: Any = STAGES, *, batch_size: int = 8, steps: int = 2, **how: Any) -> list[Tensor | None]:
    how = {"optimizer": psa.optim.SGD(lr=0.1), "microbatches": 2, "ranks": 1, **how}
    losses = []
    with psa.Worker(job, stages=stages, steps=steps, **how) as worker:
        for batch in worker.batches(DATA, batch_size=batch_size):
            losses.append(worker.compute(batch))
            worker.step(losses[-1])
    return losses


def test_the_loss_is_that_of_the_model_in_one_piece(job: str) -> None:
    losses = train(job)
    whole = nn.Sequential(*(build().get_submodule(name) for build, name in zip(STAGES, ("front", "back"), strict=True)))
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    with psa.Store(job) as store:
        parameters = store.state_dict()
    for loss, step in zip(losses, range(2), strict=True):
        indices = sample_indices(0, step, 0, ranks=1, batch_size=8, n=len(DATA))
        expected = whole(torch.stack([DATA[i] for i in indices])).square().mean()
        assert loss is not None
        torch.testing.assert_close(loss, expected.detach())
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    torch.testing.assert_close(parameters["back.weight"], whole[1].weight.data)


class Whole(nn.Module):
    """A model in one piece that is its own only stage, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.scale = float(
            self.layer.weight.detach().abs().max().item()
        )  # looks at a value: not on torch's meta device

    def forward(self, carry: Any, microbatch: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(microbatch), 0.5).square().mean() * self.scale


def test_one_stage_has_the_bits_of_a_model_in_one_piece(job: str, site: Site) -> None:
    optimizer, other = psa.optim.Adam(lr=0.1), f"{job}-whole"
    servers = Servers(site, other)
    with psa.Worker(job, stages=[Whole], optimizer=optimizer, ranks=2, steps=4) as worker:
        for batch in worker.batches(DATA, batch_size=8):
            worker.step(worker.compute(batch))
    model = Whole()
    with psa.Worker(other, model, optimizer=optimizer, ranks=2, steps=4) as worker:
        for batch in worker.batches(DATA, batch_size=8):
            loss = model(None, batch)
            loss.backward()
            worker.step(loss)
    servers.stop()
    assert site.digest(job, 4) == site.digest(other, 4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"microbatches": 4}, "microbatches=2"),
        ({"stages": [partial(Part, "front", False), partial(Part, "other", True)]}, "tensor"),
    ],
)
def test_a_stored_job_keeps_its_cut(job: str, changed: dict[str, Any], words: str) -> None:
    train(job, steps=1)
    with pytest.raises(JobMismatch, match=words):
        train(job, **{"stages": STAGES, **changed})


def test_a_model_in_one_piece_is_another_job(job: str) -> None:
    train(job, steps=1)
    model = nn.Module()
    model.front, model.back = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    with (
        pytest.raises(JobMismatch, match="stages"),
        psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), ranks=1, steps=2),
    ):
        pass


class Tied(Part):
    """Both stages begin with the same layer."""

    def __init__(self, name: str, is_last: bool) -> None:
        super().__init__(name, is_last)
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, carry: Any, microbatch: Tensor) -> Any:
        return super().forward(self.shared(microbatch if carry is None else carry), microbatch)


def parameters_of(modules: dict[int, nn.Module]) -> dict[str, Tensor]:
    return {name: each.detach().clone() for stage in modules.values() for name, each in stage.named_parameters()}


def test_the_state_of_the_script_goes_with_the_version(job: str) -> None:
    """To both ranks, into a second stretch of the job, and nothing else is changed by it."""
    seen: list[tuple[int, int, list[int]]] = []

    def stretch(steps: int) -> dict[str, Any]:
        how: dict[str, Any] = {"optimizer": psa.optim.SGD(lr=0.1), "microbatches": 2, "ranks": 2, "steps": steps}
        with psa.Worker(job, stages=STAGES, state={"steps": []}, **how) as worker:
            for batch in worker.batches(DATA, batch_size=8):
                seen.append((worker.version, worker.rank, list(worker.state["steps"])))
                loss = worker.compute(batch)
                assert worker.is_main
                if worker.rank == 0:
                    worker.state["steps"].append(worker.version)
                worker.step(loss)
        return worker.state

    stretch(2)
    assert stretch(3) == {"steps": [0, 1, 2]}
    assert seen == [(step, rank, list(range(step))) for step in range(3) for rank in range(2)]
    with psa.Store(job) as store:
        assert store.state_dict().keys() == {
            f"{part}.{name}" for part in ("front", "back") for name in ("weight", "bias")
        }


def test_the_average_is_in_the_stages_that_are_here(job: str) -> None:
    stages, averaged = [partial(Tied, "front", False), partial(Tied, "back", True)], {}
    how: dict[str, Any] = {"optimizer": psa.optim.Adam(lr=0.1), "microbatches": 2, "ranks": 1, "steps": 3}
    with psa.Worker(job, stages=stages, average=psa.ema(0.5), **how) as worker:
        assert worker.stages == {}
        for batch in worker.batches(DATA, batch_size=8):
            loss = worker.compute(batch)
            with pytest.raises(UsageError, match=r"worker.average\(\) between worker.compute\(\) and worker.step\(\)"):
                worker.average()
            worker.step(loss)
            present = parameters_of(worker.stages)
            averaged = {name: each.lerp(averaged.get(name, each), 0.5) for name, each in present.items()}
            with worker.average() as step:
                assert step == worker.version
                torch.testing.assert_close(parameters_of(worker.stages), averaged)
                for module in worker.stages.values():
                    assert torch.equal(module.shared.weight, worker.stages[0].shared.weight)
                with pytest.raises(UsageError, match=r"worker.compute\(\) inside `with worker.average\(\)`"):
                    worker.compute(batch)
            torch.testing.assert_close(parameters_of(worker.stages), present, rtol=0, atol=0)
    with psa.Store(job) as store:
        torch.testing.assert_close(store.state_dict(average=True), averaged)


def returns(what: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    class Other(Part):
        def forward(self, carry: Any, microbatch: Tensor) -> Any:
            return what(super().forward(carry, microbatch))

    return partial(Other, "front", False)


leaked: list[Tensor] = []


def leak(x: Tensor) -> Tensor:
    leaked.append(x)
    return x


class Crossing(Part):
    def forward(self, carry: Any, microbatch: Tensor) -> Any:
        return super().forward(carry + leaked.pop(), microbatch)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (returns(lambda x: {"x": x}), "stage 0 returned a dict"),
        (returns(lambda x: (x, 3)), "stage 0 returned a tuple with a int"),
        (returns(lambda x: None), "stage 0 returned a NoneType"),
    ],
)
def test_a_stage_returns_tensors(job: str, first: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        train(job, [first, STAGES[1]])


def test_the_last_stage_returns_a_loss(job: str) -> None:
    with pytest.raises(UsageError, match=r"the last stage returned a tensor of shape \(4, 6\)"):
        train(job, [STAGES[0], partial(Part, "back", False)])


def test_what_crosses_a_cut_is_declared(job: str) -> None:
    with pytest.raises(UsageError, match="stage 1 computed with a tensor"):
        train(job, [returns(leak), partial(Crossing, "back", True)])


def test_a_batch_that_can_not_be_cut(job: str) -> None:
    with pytest.raises(UsageError, match="a batch of 7 samples for a rank can not be cut into 2 micro-batches"):
        train(job, batch_size=7)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "async"}, "mode async with stages"),
        ({"mode": "local:steps=4"}, "with stages: only sync"),
        ({"mode": "sync:speculate"}, "with stages: only sync"),
        ({"state": []}, "state=.*: a list; give a dictionary"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)},
            "one of torch goes with a whole model",
        ),
        ({"microbatches": 0}, "microbatches=0"),
        ({"push_early": True}, "push_early=.* does not go with stages"),
        ({"resident_stages": 0}, "resident_stages=0"),
        ({"stages": None, "model": nn.Linear(2, 2), "microbatches": 1, "resident_stages": 1}, "a model in one piece"),
        ({"stages": None, "model": nn.Linear(2, 2)}, "microbatches=2 goes with stages"),
        ({"stages": []}, "needs a model, or stages"),
        ({"model": nn.Linear(2, 2)}, "and not both"),
    ],
)
@pytest.mark.usefixtures("environment")
def test_what_does_not_go_with_stages_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        train("stages-refused", **{"stages": STAGES, **given})


def test_statements_of_a_model_in_one_piece_are_refused(job: str) -> None:
    optimizer = psa.optim.SGD(lr=0.1)
    with psa.Worker(job, stages=STAGES, microbatches=2, optimizer=optimizer, ranks=1, steps=3) as worker:
        batches = worker.batches(DATA, batch_size=8)
        batch = next(batches)
        with pytest.raises(UsageError, match=r"worker.step\(\) without worker.compute\(batch\)"):
            worker.step()
    del batch


class Weighted(Part):
    """Counts its first micro-batch only; the loss of the other one is NaN."""

    def forward(self, carry: Any, microbatch: Tensor) -> Any:
        self.turn = getattr(self, "turn", 0) + 1
        loss = super().forward(carry, microbatch)
        return (loss, 2.0) if self.turn % 2 else (loss * float("nan"), 0.0)


def test_a_micro_batch_of_weight_0_is_left_out_be_it_nan(job: str) -> None:
    (loss,) = train(job, [STAGES[0], partial(Weighted, "back", True)], steps=1)
    whole = nn.Sequential(*(build().get_submodule(name) for build, name in zip(STAGES, ("front", "back"), strict=True)))
    indices = sample_indices(0, 0, 0, ranks=1, batch_size=8, n=len(DATA))
    expected = whole(torch.stack([DATA[i] for i in indices[:4]])).square().mean()
    assert loss is not None
    torch.testing.assert_close(loss, expected.detach())
    expected.backward()
    with psa.Store(job) as store:
        after = store.state_dict()
    for index, name in enumerate(("front", "back")):
        weight = whole[index].weight
        assert weight.grad is not None
        torch.testing.assert_close(after[f"{name}.weight"], weight.data - 0.1 * weight.grad)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of private memory are Linux's")
def test_a_model_that_is_too_large_for_a_worker_trains_in_stages(site: Site, tmp_path: Path) -> None:
    """67 MB of parameters, 200 MB with the optimizer's; a worker may have 170 MB more than torch takes.

    One that has a stage after the other trains it all with 150 MB.
    """
    env = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # else malloc keeps addresses of what was freed, which count here
        "PSA_SESSION_TIMEOUT_S": "30",  # a worker that is only slow must not leave its stage to another
    }

    def run(stages: int, workers: int, *limits: str) -> Run:
        job, peaks = f"large-{stages}-{workers}", tmp_path / f"{stages}-{workers}"
        script = [memory.__file__, "train-memory", job, str(stages), "1448", str(peaks), *limits]
        how = ["--workers", str(workers), "--servers", "1", "--ranks", "1"]
        return Run(["run", *how, *script], {**site.env, **env})

    in_one = run(1, 1, "170")
    assert in_one.finish() == 1
    assert "not enough memory to " in in_one.output and "more stages" in in_one.output
    in_four = run(4, 4, "170")
    assert in_four.finish() == 0, in_four.output
    assert len((tmp_path / "4-4").read_text().split()) == 4
    with psa.Store("large-4-4", site.redis) as store:
        assert store.version() == 2
    by_one = run(4, 1, "150", "1")
    assert by_one.finish() == 0, by_one.output
    assert site.digest("large-4-1", 2) == site.digest("large-4-4", 2)
