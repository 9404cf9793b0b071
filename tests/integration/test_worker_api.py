"""The worker as user code meets it, in this process, against real servers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import psa_store as psa
from psa_store.errors import UsageError
from psa_store.job.sampling import sample_indices
from tests.integration.toy import make_data, make_model

STEPS = 12
SEED = 5
BATCH = 8


pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.parametrize("job", [2], indirect=True)
def test_training_equals_a_plain_loop_with_torch(job: str) -> None:
    """AdamW with clipping, a schedule and weight decay on matrices, over shards on two servers."""
    data = make_data()
    schedule = psa.optim.warmup_cosine(0.05, warmup=3, total=STEPS, final=0.01)
    rule = psa.optim.AdamW(
        lr=schedule, weight_decay=0.0, clip_grad_norm=0.2, groups=[psa.optim.group("matrices", weight_decay=0.3)]
    )
    ours, theirs = make_model(), make_model()
    with psa.Worker(job, ours, optimizer=rule, ranks=2, steps=STEPS, seed=SEED, shard_bytes=4096) as worker:
        for x, y in worker.batches(data, batch_size=BATCH):
            nn.functional.mse_loss(ours(x), y).backward()
            worker.step()
        assert worker.finished and worker.version == STEPS
    assert worker.version == STEPS, "it stays after the with statement"

    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    for step in range(STEPS):
        indices = sample_indices(SEED, step, 0, ranks=1, batch_size=BATCH, n=len(data))
        x, y = (torch.stack([data[i][part] for i in indices]) for part in (0, 1))
        optimizer.zero_grad()
        nn.functional.mse_loss(theirs(x), y).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.2)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_an_optimizer_of_torch_is_taken_as_what_it_says(job: str) -> None:
    """The script may make torch's optimizer and schedule, but not step them: the servers update."""
    data, ours, theirs = make_data(), make_model(), make_model()

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [each for each in model.parameters() if each.dim() > 1]
        vectors = [each for each in model.parameters() if each.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 0.02}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.3)

    mine, other = optimizer_of(ours), optimizer_of(theirs)
    with psa.Worker(job, ours, optimizer=mine, steps=STEPS, seed=SEED) as worker:
        for x, y in worker.batches(data, batch_size=BATCH):
            mine.zero_grad()
            nn.functional.mse_loss(ours(x), y).backward()
            if worker.version == STEPS - 1:
                mine.param_groups[1]["lr"] = 0.5
                with pytest.raises(UsageError, match=r"lr of the optimizer's group 1 was changed"):
                    worker.step()
                mine.param_groups[1]["lr"] = 0.02
            worker.step()
    for step in range(STEPS):
        indices = sample_indices(SEED, step, 0, ranks=1, batch_size=BATCH, n=len(data))
        x, y = (torch.stack([data[i][part] for i in indices]) for part in (0, 1))
        other.zero_grad()
        nn.functional.mse_loss(theirs(x), y).backward()
        other.step()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_accumulated_parts_make_one_gradient(job: str) -> None:
    data = make_data()
    model, whole = make_model(), make_model()
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=1, seed=SEED) as worker:
        for x, y in worker.batches(DataLoader(data, batch_size=4)):
            with worker.accumulate():
                (nn.functional.mse_loss(model(x[:2]), y[:2]) / 2).backward()
            (nn.functional.mse_loss(model(x[2:]), y[2:]) / 2).backward()
            worker.step()
            nn.functional.mse_loss(whole(x), y).backward()
    for mine, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(mine.detach(), other.detach() - 0.1 * other.grad)


def test_misuse_is_told_and_the_job_goes_on(job: str) -> None:
    data = make_data()
    model = make_model()
    rule = psa.optim.SGD(lr=0.1)
    with psa.Worker(job, model, optimizer=rule, ranks=2, steps=2, seed=SEED, push_early=True) as worker:
        with pytest.raises(UsageError, match=r"without a batch"):
            worker.step()
        with pytest.raises(UsageError, match=r"batch_size=7.*2"):
            next(iter(worker.batches(data, batch_size=7)))
        with pytest.raises(UsageError, match="needs batch_size="):
            next(iter(worker.batches(data)))
        batches = worker.batches(data, batch_size=4)
        x, y = next(batches)
        nn.functional.mse_loss(model(x), y).backward()
        with pytest.raises(UsageError, match=r"backward\(\) ran twice"):
            nn.functional.mse_loss(model(x), y).backward()
        with pytest.raises(UsageError, match=r"not followed by worker\.step"):
            next(batches)


def test_a_parameter_that_is_not_used_counts_as_zero(job: str) -> None:
    model = make_model()
    model.register_parameter("spare", nn.Parameter(torch.ones(5)))
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=2, seed=SEED) as worker:
        for x, y in worker.batches(make_data(), batch_size=4):
            nn.functional.mse_loss(model(x), y).backward()
            worker.step()
    assert torch.equal(model.get_parameter("spare").detach(), torch.ones(5))


class TestWithoutServers:
    @pytest.mark.parametrize(
        ("job", "words"), [("no spaces", "letters, digits"), ("", "no name"), ("x" * 101, "up to 100")]
    )
    def test_job_names(self, job: str, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            psa.Worker(job, make_model(), optimizer=psa.optim.SGD(lr=0.1))

    def test_a_model_without_tensors(self) -> None:
        with pytest.raises(UsageError, match="no parameters"):
            psa.Worker("empty", nn.Tanh(), optimizer=psa.optim.SGD(lr=0.1))

    def test_the_surroundings_must_be_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PSA_REDIS")
        with (
            pytest.raises(UsageError, match="psa run"),
            psa.Worker("nowhere", make_model(), optimizer=psa.optim.SGD(lr=0.1)),
        ):
            pass

    def test_a_bad_setting_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PSA_SESSION_TIMEOUT_S", "soon")
        with pytest.raises(UsageError, match="PSA_SESSION_TIMEOUT_S='soon'"):
            psa.Worker("nowhere", make_model(), optimizer=psa.optim.SGD(lr=0.1))
