"""A scheduler of torch beside an optimizer of torch: the job has its rates, whether the script ticks it or not."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, SequentialLR, StepLR

import psa_store as psa
from psa_store.errors import JobMismatch, UsageError
from psa_store.job.sampling import sample_indices
from tests.harness import Servers, Site
from tests.integration.toy import make_data, make_model
from tests.unit.optimizers import OPTIMIZERS

STEPS = 12
RANKS = 2
SEED = 5
BATCH = 8


pytestmark = pytest.mark.usefixtures("environment")


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [each for each in model.parameters() if each.dim() > 1 and each.requires_grad]
    vectors = [each for each in model.parameters() if each.dim() < 2]
    return torch.optim.NAdam([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 5e-3}], lr=2e-2)


def stairs(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return StepLR(optimizer, 3, gamma=0.5)


def warm_up(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.1, total_iters=4), LambdaLR(optimizer, lambda step: 0.9**step)],
        milestones=[4],
    )


def torchs_own(make: Callable[[torch.optim.Optimizer], LRScheduler]) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Plain torch: the model after the last step, and the rates before each."""
    model, data = make_model(), make_data()
    optimizer = make_optimizer(model)
    scheduler, rates = make(optimizer), []
    for step in range(STEPS):
        rates.append([float(each["lr"]) for each in optimizer.param_groups])
        optimizer.zero_grad()
        for rank in range(RANKS):
            indices = sample_indices(SEED, step, rank, ranks=RANKS, batch_size=BATCH, n=len(data))
            x, y = (torch.stack([data[i][part] for i in indices]) for part in (0, 1))
            (nn.functional.mse_loss(model(x), y) / RANKS).backward()
        optimizer.step()
        scheduler.step()
    rates.append([float(each["lr"]) for each in optimizer.param_groups])
    return model.state_dict(), rates


class Script:
    """A model, its optimizer and scheduler, and a worker of the job."""

    def __init__(self, job: str, make: Callable[[torch.optim.Optimizer], LRScheduler], **options: Any) -> None:
        self.model = make_model()
        self.optimizer = make_optimizer(self.model)
        self.scheduler = make(self.optimizer)
        arguments: dict[str, Any] = {"lr_scheduler": self.scheduler, "ranks": RANKS, "steps": STEPS, "seed": SEED}
        self.worker = psa.Worker(job, self.model, optimizer=self.optimizer, **{**arguments, **options})

    def batches(self) -> Iterator[None]:
        """After the backward pass of each batch."""
        for x, y in self.worker.batches(make_data(), batch_size=BATCH):
            nn.functional.mse_loss(self.model(x), y).backward()
            yield

    def rates(self) -> list[float]:
        return [float(each["lr"]) for each in self.optimizer.param_groups]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ticks", [True, False], ids=["ticked", "left alone"])
@pytest.mark.parametrize("make", [stairs, warm_up])
def test_the_job_has_the_rates_of_the_scheduler(
    job: str, make: Callable[[torch.optim.Optimizer], LRScheduler], ticks: bool
) -> None:
    theirs, rates = torchs_own(make)
    script = Script(job, make)
    kind = type(script.scheduler)
    with script.worker as worker:
        for _ in script.batches():
            step = worker.version
            assert script.rates() == pytest.approx(rates[step], rel=1e-7)
            assert script.scheduler.get_last_lr() == pytest.approx(rates[step], rel=1e-7)
            worker.step()
            if ticks:
                script.scheduler.step()
                assert script.rates() == pytest.approx(rates[step + 1], rel=1e-7)
                assert script.scheduler.last_epoch == step + 1
        assert isinstance(script.scheduler, kind)
        if kind is StepLR:
            pickle.dumps(script.scheduler.state_dict())  # what scripts save has nothing of the worker
    assert type(script.scheduler) is kind
    assert_close(script.model.state_dict(), theirs)


def test_an_optimizer_without_a_scheduler_shows_the_rate_that_the_job_was_set_to(job: str) -> None:
    script = Script(job, stairs, lr_scheduler=None)
    seen: list[tuple[list[float], float]] = []
    with script.worker as worker:
        assert worker.lr_at(0) == 2e-2
        for _ in script.batches():
            seen.append((script.rates(), worker.lr_at(worker.version)))
            worker.step()
            if worker.version == 3:
                worker.change(lr=0.01)
    before, after = ([2e-2, 5e-3], 2e-2), ([0.01, 0.0025], 0.01)
    assert seen == [before] * 3 * RANKS + [after] * (STEPS - 3) * RANKS
    assert worker.lr_at(2) == 2e-2, "what was applied then"


def test_a_resumed_job_goes_on_with_the_rates_of_its_step(job: str) -> None:
    theirs, rates = torchs_own(warm_up)
    first = Script(job, warm_up)
    with first.worker as worker:
        for _ in first.batches():
            worker.step()
            first.scheduler.step()
            if worker.version == 7:
                break
    second, seen = Script(job, warm_up), []
    with second.worker as worker:
        for _ in second.batches():
            seen.append(worker.version)
            assert second.rates() == pytest.approx(rates[worker.version], rel=1e-7)
            worker.step()
            second.scheduler.step()
    assert seen[0] > 0, "it has resumed"
    assert_close(second.model.state_dict(), theirs)


@pytest.mark.parametrize("name", ["amsgrad", "adamax", "adadelta", "lion"])
def test_the_state_of_an_optimizer_is_what_it_was_after_a_resume(site: Site, name: str) -> None:
    models = []
    for job, breaks in ((f"whole-{name}", ()), (f"resumed-{name}", (4, 9))):
        servers = Servers(site, job, 1)
        for end in (*breaks, STEPS):
            model = make_model()
            with psa.Worker(job, model, optimizer=OPTIMIZERS[name], ranks=RANKS, steps=STEPS, seed=SEED) as worker:
                for x, y in worker.batches(make_data(), batch_size=BATCH):
                    nn.functional.mse_loss(model(x), y).backward()
                    worker.step()
                    if worker.version == end:
                        break
        servers.stop()
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_another_scheduler_is_another_job(job: str) -> None:
    with Script(job, stairs).worker:
        pass
    with pytest.raises(JobMismatch, match="exists with lr="), Script(job, warm_up).worker:
        pass


def tick_by_pass(script: Script) -> None:
    for count, _ in enumerate(script.batches(), start=1):
        script.worker.step()
        if count % 4 == 0:
            script.scheduler.step()


def tick_first(script: Script) -> None:
    for _ in script.batches():
        script.scheduler.step()
        script.worker.step()


def tick_twice(script: Script) -> None:
    for _ in script.batches():
        script.worker.step()
        script.scheduler.step()
        script.scheduler.step()


def tick_to_a_number(script: Script) -> None:
    for _ in script.batches():
        script.worker.step()
        script.scheduler.step(3)


def set_the_rate(script: Script) -> None:
    for _ in script.batches():
        script.worker.step()
        script.optimizer.param_groups[0]["lr"] = 0.5


TICKED_OTHERWISE: dict[Callable[[Script], None], str] = {
    tick_by_pass: r"test_lr_scheduler\.py:\d+: scheduler\.step\(\) after 2 steps .* StepLR\(",
    tick_first: r"test_lr_scheduler\.py:\d+: scheduler\.step\(\) after 0 steps",
    tick_twice: r"test_lr_scheduler\.py:\d+: scheduler\.step\(\) after 0 steps",
    tick_to_a_number: r"test_lr_scheduler\.py:\d+: .* no argument",
    set_the_rate: r"lr of the optimizer's group 0 was changed from .* to 0\.5",
}


@pytest.mark.parametrize(("train", "words"), TICKED_OTHERWISE.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_another_rhythm_of_ticks_is_refused(job: str, train: Callable[[Script], None], words: str) -> None:
    script = Script(job, stairs)
    with pytest.raises(UsageError, match=words), script.worker:
        train(script)


def test_a_batch_that_is_left_out_may_go_without_a_tick(job: str) -> None:
    script = Script(job, stairs)
    with script.worker as worker:
        for count, _ in enumerate(script.batches()):
            if count % 5 == 0:
                worker.skip()
                if count % 10 == 0:
                    script.scheduler.step()
            else:
                worker.step()
                script.scheduler.step()
    assert worker.version == STEPS


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_scheduler_that_was_not_given_is_refused_at_its_first_change(job: str) -> None:
    script = Script(job, stairs, lr_scheduler=None)
    with pytest.raises(UsageError, match=r"test_lr_scheduler\.py:\d+: lr of .*lr_scheduler=…"), script.worker as worker:
        for _ in script.batches():
            worker.step()
            script.scheduler.step()


def test_a_scheduler_beside_psa_optim_is_refused() -> None:
    model = make_model()
    scheduler = stairs(make_optimizer(model))
    with pytest.raises(UsageError, match=r"lr=psa\.optim\.warmup_cosine"):
        psa.Worker("unused", model, optimizer=psa.optim.SGD(0.1), lr_scheduler=scheduler)
