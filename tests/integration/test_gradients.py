"""What a script does to gradients between backward() and worker.step() counts, as in plain torch, or is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import psa_store as psa
from psa_store.errors import UsageError
from psa_store.job.sampling import sample_indices
from psa_store.worker.backward import WATCHED_STEPS
from tests.harness import Servers, Site
from tests.integration.toy import make_data, make_model

STEPS = 10
RANKS = 2
SEED = 5
BATCH = 8
Touch = Callable[[nn.Sequential], None]


def clip_norm(model: nn.Sequential) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def clip_value(model: nn.Sequential) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.001)


def scale_data(model: nn.Sequential) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.data *= 0.25


def zero(model: nn.Sequential) -> None:
    for p in model[0].parameters():
        assert p.grad is not None
        p.grad.zero_()


def drop(model: nn.Sequential) -> None:
    for p in model[0].parameters():
        p.grad = None


def assign(model: nn.Sequential) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad.sign()


def write_numpy(model: nn.Sequential) -> None:
    for p in model[2].parameters():
        assert p.grad is not None
        p.grad.numpy()[...] = 0.5


def add_noise(model: nn.Sequential) -> None:
    draw = torch.Generator().manual_seed(3)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(torch.randn(p.shape, generator=draw), alpha=0.1)


TOUCHES: list[Touch] = [clip_norm, clip_value, scale_data, zero, drop, assign, write_numpy, add_noise]


pytestmark = pytest.mark.usefixtures("environment")


def train(job: str, touch: Callable[[nn.Sequential, int], None], **options: object) -> nn.Sequential:
    model = make_model()
    rule = psa.optim.SGD(lr=0.1)
    with psa.Worker(job, model, optimizer=rule, ranks=RANKS, steps=STEPS, seed=SEED, **options) as worker:  # type: ignore[arg-type]
        for x, y in worker.batches(make_data(), batch_size=BATCH):
            nn.functional.mse_loss(model(x), y).backward()
            touch(model, worker.version)
            worker.step()
    return model


def plain(touch: Touch) -> nn.Sequential:
    """The mean of what each rank has after ``touch``, as SGD applies it."""
    model, data = make_model(), make_data()
    for step in range(STEPS):
        total: list[torch.Tensor] = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(RANKS):
            indices = sample_indices(SEED, step, rank, ranks=RANKS, batch_size=BATCH, n=len(data))
            x, y = (torch.stack([data[i][part] for i in indices]) for part in (0, 1))
            model.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            touch(model)
            for place, p in zip(total, model.parameters(), strict=True):
                if p.grad is not None:
                    place += p.grad
        with torch.no_grad():
            for place, p in zip(total, model.parameters(), strict=True):
                p -= 0.1 * place / RANKS
    return model


def assert_close(ours: nn.Module, theirs: nn.Module) -> None:
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("touch", "carrier"),
    [(touch, "auto") for touch in TOUCHES] + [(touch, "tcp") for touch in (clip_norm, scale_data, drop)],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_a_changed_gradient_counts(job: str, touch: Touch, carrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSA_CARRIER", carrier)
    assert_close(train(job, lambda model, _: touch(model)), plain(touch))


@pytest.mark.parametrize("touch", [clip_norm, assign, drop], ids=lambda touch: touch.__name__)
def test_it_counts_on_arrival(job: str, touch: Touch) -> None:
    """With one rank, async computes what plain SGD does."""
    model, reference, data = make_model(), make_model(), make_data()
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=STEPS, seed=SEED, mode="async") as worker:
        for x, y in worker.batches(data, batch_size=BATCH):
            nn.functional.mse_loss(model(x), y).backward()
            touch(model)
            worker.step()
    sgd = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(STEPS):
        indices = sample_indices(SEED, step, 0, ranks=1, batch_size=BATCH, n=len(data))
        x, y = (torch.stack([data[i][part] for i in indices]) for part in (0, 1))
        sgd.zero_grad()
        nn.functional.mse_loss(reference(x), y).backward()
        touch(reference)
        sgd.step()
    assert_close(model, reference)


@pytest.mark.parametrize("touch", [zero, drop], ids=lambda touch: touch.__name__)
def test_it_counts_in_rounds(job: str, touch: Touch) -> None:
    model = train(job, lambda model, _: touch(model), mode="local:steps=2")
    for trained, initial in zip(model, make_model(), strict=True):
        for mine, before in zip(trained.parameters(), initial.parameters(), strict=True):
            assert torch.equal(mine, before) is (trained is model[0])


@pytest.mark.parametrize("mode", ["sync", "async", "local:steps=2"])
def test_sparse_gradients_count_like_dense_ones(site: Site, mode: str) -> None:
    """With one rank; in rounds, too, both do the same."""

    def trained(sparse: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        bag, table = nn.EmbeddingBag(20, 4, mode="sum", sparse=sparse), nn.Embedding(20, 4, sparse=sparse)
        model = nn.ModuleList([bag, table, nn.Linear(4, 1)])
        name = f"sparse-{sparse}-{mode.partition(':')[0]}"
        Servers(site, name, 1)
        with psa.Worker(name, model, optimizer=psa.optim.SGD(lr=0.1), steps=STEPS, seed=SEED, mode=mode) as worker:
            for batch in worker.batches(torch.arange(20), batch_size=5):
                model[2](bag(batch[:, None]) + table(batch)).square().sum().backward()
                worker.step()
        return [each.detach().clone() for each in model.parameters()]

    for left, right in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(left, right)


def test_an_accumulation_loop_needs_no_word(job: str) -> None:
    """Two backward() for one batch add up, if they do so from the first step on."""
    model, data = make_model(), make_data()
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), ranks=RANKS, steps=STEPS, seed=SEED) as worker:
        for x, y in worker.batches(data, batch_size=BATCH):
            for part in range(2):
                half = slice(part * 2, part * 2 + 2)
                (nn.functional.mse_loss(model(x[half]), y[half]) / 2).backward()
            worker.step()
    assert_close(model, plain(lambda _: None))


@pytest.mark.parametrize("touch", [clip_norm, zero, drop, assign], ids=lambda touch: touch.__name__)
def test_a_change_that_begins_later_is_refused_by_name(job: str, touch: Touch) -> None:
    with pytest.raises(UsageError, match=r"gradient of \d\.(weight|bias) was changed .* push_early=False"):
        train(job, lambda model, version: touch(model) if version >= WATCHED_STEPS + 2 else None)


def test_a_later_change_that_leaves_no_trace_is_found_within_a_turn(job: str) -> None:
    seen: list[int] = []

    def late(model: nn.Sequential, version: int) -> None:
        seen.append(version)
        if version > WATCHED_STEPS:
            scale_data(model)

    with pytest.raises(UsageError, match="was changed"):
        train(job, late)
    assert seen[-1] <= WATCHED_STEPS + 1, "all gradients are changed, so the one that is compared is"


def test_a_change_that_begins_later_counts_if_that_was_said(job: str) -> None:
    def from_the_fifth(model: nn.Sequential, version: int) -> None:
        if version >= 5:
            clip_norm(model)

    steps = iter(step for step in range(STEPS) for _ in range(RANKS))
    expected = plain(lambda model: from_the_fifth(model, next(steps)))
    assert_close(train(job, from_the_fifth, push_early=False), expected)


def test_a_second_backward_that_comes_later_is_refused(job: str) -> None:
    def again(model: nn.Sequential, version: int) -> None:
        if version == WATCHED_STEPS:
            model(torch.ones(1, 6)).sum().backward()

    with pytest.raises(UsageError, match=r"backward\(\) ran twice.*accumulate"):
        train(job, again)


def test_a_batch_that_is_left_out_leaves_the_other_ranks(job: str) -> None:
    """Whether its backward() has run or not; weights are those of what is left."""
    model, data = make_model(), make_data()
    rule = psa.optim.SGD(lr=0.1)
    with psa.Worker(job, model, optimizer=rule, ranks=RANKS, steps=STEPS, seed=SEED, push_early=False) as worker:
        for x, y in worker.batches(data, batch_size=BATCH):
            if worker.rank == 0 and worker.version % 2:
                worker.skip()
                continue
            nn.functional.mse_loss(model(x), y).backward()
            if worker.rank == 0:
                worker.skip()
            else:
                worker.step(weight=7)
    assert_close(model, weighted(lambda rank: float(rank == 1)))


def weighted(weight_of: Callable[[int], float]) -> nn.Sequential:
    """SGD with the weighted mean of the ranks' gradients."""
    model, data = make_model(), make_data()
    for step in range(STEPS):
        model.zero_grad()
        for rank in range(RANKS):
            indices = sample_indices(SEED, step, rank, ranks=RANKS, batch_size=BATCH, n=len(data))
            x, y = (torch.stack([data[i][part] for i in indices]) for part in (0, 1))
            share = weight_of(rank) / sum(map(weight_of, range(RANKS)))
            (nn.functional.mse_loss(model(x), y) * share).backward()
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
    return model


@pytest.mark.parametrize("carrier", ["auto", "tcp"])
def test_ranks_count_by_their_weights(job: str, carrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSA_CARRIER", carrier)
    model, data = make_model(), make_data()
    rule = psa.optim.SGD(lr=0.1)
    with psa.Worker(job, model, optimizer=rule, ranks=RANKS, steps=STEPS, seed=SEED) as worker:
        for x, y in worker.batches(data, batch_size=BATCH):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            worker.step(loss, weight=3 if worker.rank == 0 else 17)
    assert_close(model, weighted(lambda rank: (3.0, 17.0)[rank]))


def train_weighted(job: str, weight_of: Callable[[int], object], mode: str = "sync") -> None:
    """Give a weight with each step; ``weight_of``: by version."""
    model = make_model()
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=STEPS, seed=SEED, mode=mode) as worker:
        for x, y in worker.batches(make_data(), batch_size=BATCH):
            nn.functional.mse_loss(model(x), y).backward()
            worker.step(weight=weight_of(worker.version))  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 1e39, "many"])
def test_a_weight_that_is_none_is_refused(job: str, weight: object) -> None:
    with pytest.raises(UsageError, match=r"test_gradients\.py:\d+: worker\.step\(weight="):
        train_weighted(job, lambda _: weight)


@pytest.mark.parametrize("mode", ["async", "local:steps=2"])
def test_weights_are_refused_where_no_mean_is_made(job: str, mode: str) -> None:
    with pytest.raises(UsageError, match=f"in mode {mode}.* scale the loss"):
        train_weighted(job, lambda _: 2, mode)


def test_a_weight_that_comes_later_is_refused(job: str) -> None:
    with pytest.raises(UsageError, match=r"weight=2\.0: gradients have left already.*push_early=False"):
        train_weighted(job, lambda version: 2 if version > WATCHED_STEPS else 1)


class TwoHeads(nn.Module):
    """Each of them is used in some steps only; ``never`` in none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.heads, self.never = (
            nn.Linear(6, 8),
            nn.ModuleList(nn.Linear(8, 1) for _ in range(2)),
            nn.Linear(2, 2),
        )

    def loss(self, x: torch.Tensor, step: int, rank: int) -> torch.Tensor:
        """In step 5 one rank of two uses the first head."""
        head = int(step % 3 == 0 or (step == 5 and rank == 0))
        return self.heads[head](torch.tanh(self.body(x))).square().mean()


@pytest.mark.parametrize(
    ("mode", "carrier", "ranks"),
    [("sync", "auto", 2), ("sync", "tcp", 2), ("async", "auto", 1), ("local:steps=2", "auto", 1)],
    ids=lambda each: str(each).partition(":")[0],
)
def test_a_parameter_without_a_gradient_is_skipped(
    job: str, mode: str, carrier: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No decay, no momentum, no step count, as torch has it where ``.grad`` is None."""
    monkeypatch.setenv("PSA_CARRIER", carrier)
    model, reference, data = TwoHeads(), TwoHeads(), make_data()
    rule = psa.optim.AdamW(lr=0.01, weight_decay=0.5)
    with psa.Worker(job, model, optimizer=rule, ranks=ranks, steps=STEPS, seed=SEED, mode=mode) as worker:
        for x, _ in worker.batches(data, batch_size=BATCH):
            model.loss(x, worker.version, worker.rank).backward()
            worker.step()
    if mode.startswith("local"):
        assert torch.equal(model.never.weight, reference.never.weight)
        assert not torch.equal(model.body.weight, reference.body.weight)
        return
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.5)
    for step in range(STEPS):
        theirs.zero_grad()
        for rank in range(ranks):
            indices = sample_indices(SEED, step, rank, ranks=ranks, batch_size=BATCH, n=len(data))
            (reference.loss(torch.stack([data[i][0] for i in indices]), step, rank) / ranks).backward()
        theirs.step()
    assert_close(model, reference)


def test_it_is_skipped_alike_after_a_resume(site: Site) -> None:
    """The counts of updates are committed with the shards."""

    def run(name: str, *ends: int) -> TwoHeads:
        for steps in ends:
            servers = Servers(site, name, 2)
            model = TwoHeads()
            rule = psa.optim.AdamW(lr=0.01, weight_decay=0.5)
            with psa.Worker(name, model, optimizer=rule, ranks=2, steps=steps, seed=SEED) as worker:
                for x, _ in worker.batches(make_data(), batch_size=BATCH):
                    model.loss(x, worker.version, worker.rank).backward()
                    worker.step()
            servers.stop()
        return model

    for whole, parts in zip(
        run("skipped-whole", STEPS).parameters(), run("skipped-parts", 4, 7, STEPS).parameters(), strict=True
    ):
        assert torch.equal(whole, parts)


def test_what_is_refused_names_the_line_of_the_script(job: str) -> None:
    here = r"test_gradients\.py:\d+: "
    model = make_model()
    with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=STEPS, push_early=True) as worker:
        with pytest.raises(UsageError, match=here + r"the batch before was not followed.*worker\.skip\(\)"):
            for _ in worker.batches(make_data(), batch_size=BATCH):
                pass
        for x, y in worker.batches(make_data(), batch_size=BATCH):
            nn.functional.mse_loss(model(x), y).backward()
            with pytest.raises(UsageError, match=here + r"backward\(\) ran twice"):
                model(x).sum().backward()
            clip_norm(model)
            with pytest.raises(UsageError, match=here + "the gradient of"):
                worker.step()
            break
