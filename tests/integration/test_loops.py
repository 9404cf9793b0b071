"""Loops that are usual in PyTorch scripts, and what comes of them here."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import psa_store as psa
from psa_store.errors import UsageError
from psa_store.job.sampling import sample_indices
from tests.integration.test_gradients import SEED, assert_close, plain
from tests.integration.toy import make_data, make_model

STEPS = 10


pytestmark = pytest.mark.usefixtures("environment")


def test_a_grad_scaler_unscales_what_counts(job: str) -> None:
    """scaler.step() is worker.step()."""
    model, data = make_model(), make_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with psa.Worker(job, model, optimizer=optimizer, ranks=2, steps=STEPS, seed=SEED) as worker:
        for x, y in worker.batches(data, batch_size=8):
            loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            worker.step(loss)
            scaler.update()
    assert_close(model, plain(lambda _: None))


def test_a_grad_scaler_that_steps_is_refused(job: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with (
        pytest.raises(UsageError, match=r"test_loops\.py:\d+: .* (written|changed)"),
        psa.Worker(job, model, optimizer=optimizer, ranks=2, steps=STEPS, seed=SEED) as worker,
    ):
        for x, y in worker.batches(make_data(), batch_size=8):
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            scaler.step(optimizer)
            worker.step()


class Counting(nn.Module):
    """A buffer that is larger than a socket takes at once, in which each element counts the batches of rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rank = nn.Linear(6, 1), 0
        self.register_buffer("counts", torch.zeros(4_000_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counts.add_(float(self.rank == 0))
        return self.layer(x)  # type: ignore[no-any-return]


def test_the_batch_of_the_next_rank_changes_no_buffer_that_is_on_its_way(job: str) -> None:
    model = Counting()
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), ranks=2, steps=4) as worker:
        for x, y in worker.batches(make_data(), batch_size=4):
            model.rank = worker.rank
            nn.functional.mse_loss(model(x), y).backward()
            worker.step()
    with psa.Store(job) as store:
        assert store.state_dict()["counts"].unique().tolist() == [4.0]


class Checkpointed(nn.Module):
    """Two segments with the same weights, computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.reentrant, self.layer, self.head = reentrant, nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(lambda each: torch.tanh(self.layer(each)), x, use_reentrant=self.reentrant)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_in_backward_trains_alike(job: str, reentrant: bool) -> None:
    model, reference, data = Checkpointed(reentrant), Checkpointed(False), make_data()
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=STEPS, seed=SEED) as worker:
        for x, y in worker.batches(data, batch_size=8):
            nn.functional.mse_loss(model(x), y).backward()
            worker.step()
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(STEPS):
        indices = sample_indices(SEED, step, 0, ranks=1, batch_size=8, n=len(data))
        x, y = (torch.stack([data[i][part] for i in indices]) for part in (0, 1))
        theirs.zero_grad()
        nn.functional.mse_loss(reference(x), y).backward()
        theirs.step()
    assert_close(model, reference)


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.generator, self.critic = nn.Linear(6, 6), nn.Linear(6, 1)

    def loss(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """Of the critic in even steps, of the generator in odd ones."""
        made = self.generator(torch.ones_like(x))
        if step % 2:
            return nn.functional.softplus(-self.critic(made)).mean()
        return (nn.functional.softplus(self.critic(made.detach())) + nn.functional.softplus(-self.critic(x))).mean()


def test_two_optimizers_in_turns_are_two_groups_in_turns(job: str) -> None:
    """The parameters of the other one are switched off while one has its turn."""
    model, reference, data = Gan(), Gan(), make_data()
    rule = psa.optim.Adam(lr=0.01, groups=[psa.optim.group("critic.*", lr_scale=0.5)])

    def turn(gan: Gan, x: torch.Tensor, step: int) -> None:
        gan.loss(x, step).backward()
        if step % 2:
            for parameter in gan.critic.parameters():
                parameter.grad = None

    with psa.Worker(job, model, optimizer=rule, steps=STEPS, seed=SEED) as worker:
        for x, _ in worker.batches(data, batch_size=8):
            turn(model, x, worker.version)
            worker.step()
    critic = torch.optim.Adam(reference.critic.parameters(), lr=0.005)
    generator = torch.optim.Adam(reference.generator.parameters(), lr=0.01)
    for step in range(STEPS):
        reference.zero_grad()
        indices = sample_indices(SEED, step, 0, ranks=1, batch_size=8, n=len(data))
        turn(reference, torch.stack([data[i][0] for i in indices]), step)
        (generator if step % 2 else critic).step()
    assert_close(model, reference)


def test_two_optimizers_are_refused_with_what_to_write() -> None:
    gan = Gan()
    both = [torch.optim.Adam(each.parameters()) for each in (gan.generator, gan.critic)]
    with pytest.raises(UsageError, match="Instead of two, give one with groups"):
        psa.Worker("two", gan, optimizer=both)  # type: ignore[arg-type]


def test_a_batch_that_is_read_ahead_is_refused(job: str) -> None:
    model = make_model()
    with (
        pytest.raises(UsageError, match="none can be read ahead"),
        psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=STEPS, seed=SEED) as worker,
    ):
        for _ in itertools.pairwise(worker.batches(make_data(), batch_size=8)):
            worker.step()


def test_a_loop_may_end_early_and_go_on(job: str) -> None:
    """A second loop over the batches takes up where the first was left."""
    model, data, steps = make_model(), make_data(), []
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), ranks=2, steps=STEPS, seed=SEED) as worker:
        while not worker.finished:
            for x, y in worker.batches(data, batch_size=8):
                steps.append((worker.version, worker.rank))
                nn.functional.mse_loss(model(x), y).backward()
                worker.step()
                if len(steps) % 5 == 0:
                    break
    assert steps == [(step, rank) for step in range(STEPS) for rank in range(2)]
    assert_close(model, plain(lambda _: None))
