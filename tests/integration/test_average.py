"""An average of the weights that belongs to the job: as torch's, whatever carries it, whatever dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import psa_store as psa
from psa_store.checkpoint.fork import fork
from psa_store.cli.transfer import export_files, import_files
from psa_store.coordination import Coordination
from psa_store.errors import JobMismatch, UsageError
from psa_store.job.sampling import sample_indices
from psa_store.storage import RedisStore
from tests.harness import Servers, Site
from tests.integration.toy import make_data, make_model

STEPS = 12
RANKS = 2
SEED = 5
BATCH = 8
DECAY = 0.9
LR = 0.01
SERVERS = 2


pytestmark = pytest.mark.usefixtures("environment")


def with_norm() -> nn.Sequential:
    """A model with buffers and a frozen layer, too."""
    model = make_model()
    model[2].weight.requires_grad_(False)
    return nn.Sequential(*model[:4], nn.BatchNorm1d(50), model[4])


def plain(model: nn.Module, steps: int) -> Iterator[AveragedModel]:
    """What torch has after each step."""
    data, averaged = make_data(), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(RANKS):
            indices = sample_indices(SEED, step, rank, ranks=RANKS, batch_size=BATCH, n=len(data))
            x, y = (torch.stack([data[i][part] for i in indices]) for part in (0, 1))
            (nn.functional.mse_loss(model(x), y) / RANKS).backward()
        optimizer.step()
        averaged.update_parameters(model)
        yield averaged


def worker_of(job: str, model: nn.Module, decay: float | None = DECAY, mode: str | None = None) -> psa.Worker:
    return psa.Worker(
        job,
        model,
        optimizer=psa.optim.SGD(lr=LR, momentum=0.9),
        ranks=RANKS,
        steps=STEPS,
        seed=SEED,
        shard_bytes=4096,
        mode=mode,
        average=None if decay is None else psa.ema(decay),
    )


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("carrier", ["auto", "tcp"])
def test_the_model_shows_torchs_average_inside_and_is_itself_afterwards(
    job: str, carrier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSA_CARRIER", carrier)
    model, reference = make_model(), plain(make_model(), STEPS)
    with worker_of(job, model) as worker:
        with pytest.raises(UsageError, match="before the first batch"):
            worker.average()
        for x, y in worker.batches(make_data(), batch_size=BATCH):
            nn.functional.mse_loss(model(x), y).backward()
            version = worker.version
            worker.step()
            if worker.version == version:
                continue
            expected, before = next(reference), copies(model)
            with worker.average() as step, torch.inference_mode():
                assert step == worker.version
                for mine, other in zip(model.parameters(), expected.module.parameters(), strict=True):
                    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(model(x), expected.module(x), rtol=1e-4, atol=1e-6)
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        with worker.average() as step:
            assert step == STEPS and not torch.equal(model[0].weight, before["0.weight"])
        assert torch.equal(model[0].weight, before["0.weight"])


def test_evaluating_changes_no_bit_of_training(site: Site) -> None:
    """In all places of the loop, with buffers and a frozen layer; nor does an average that is kept."""
    results = []
    for name, decay in (("average-evaluated", DECAY), ("average-left-out", None)):
        Servers(site, name, 1)
        model = with_norm()
        with worker_of(name, model, decay) as worker:
            for x, y in worker.batches(make_data(), batch_size=BATCH):
                if decay is not None:
                    with torch.inference_mode(), worker.average():
                        model.eval()(x)
                    model.train()
                loss = nn.functional.mse_loss(model(x), y)
                if decay is not None:
                    with torch.no_grad(), worker.average():
                        model[0](x)
                loss.backward()
                if decay is not None:
                    with pytest.raises(UsageError, match=r"between backward\(\) and worker\.step\(\)"):
                        worker.average()
                worker.step()
                if decay is not None:
                    with worker.average():
                        copies(model)
        results.append(copies(model))
    evaluated, left_out = results
    assert all(torch.equal(evaluated[name], left_out[name]) for name in left_out)


def test_two_ranks_in_one_worker_and_all_readers_see_the_same(site: Site, job: str, tmp_path: Path) -> None:
    """Store, export, fork and checkpoint; buffers and frozen parameters are those of the version."""
    model = with_norm()
    reference = with_norm()
    with worker_of(job, model) as worker:
        for x, y in worker.batches(make_data(), batch_size=BATCH):
            nn.functional.mse_loss(model(x), y).backward()
            worker.step()
        with worker.average():
            shown = copies(model)
    with psa.Store(job) as store:
        read = store.state_dict(average=True)
        assert all(torch.equal(read[name], tensor) for name, tensor in shown.items()) and read.keys() == shown.keys()
        assert all(torch.equal(store.state_dict(STEPS)[name], each) for name, each in model.state_dict().items())
        assert (store.get("0.weight", STEPS, average=True) == shown["0.weight"].numpy()).all()
        assert not torch.equal(read["0.weight"], model[0].weight)
        assert torch.equal(read["2.weight"], reference[2].weight), "frozen"
    export_files(job, str(STEPS), str(tmp_path / "average"), site.settings, average=True)
    written = load_file(tmp_path / "average" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in shown.items()) and written.keys() == shown.keys()
    with pytest.raises(UsageError, match="average alone"):
        import_files(str(tmp_path / "average"), f"{job}-not", site.settings, None, None)
    export_files(job, None, str(tmp_path / "all"), site.settings)
    import_files(str(tmp_path / "all"), f"{job}-imported", site.settings, None, None)
    with RedisStore.from_settings(site.settings) as redis, Coordination.from_settings(site.settings, "f") as new:
        fork(redis, new, job, str(STEPS), f"{job}-forked")
    for other in (f"{job}-imported", f"{job}-forked"):
        with psa.Store(other) as store:
            read = store.state_dict(average=True)
            assert all(torch.equal(read[name], tensor) for name, tensor in shown.items())


def test_what_is_no_evaluation_is_refused_in_the_block(job: str) -> None:
    model = make_model()
    with worker_of(job, model) as worker:
        batches = worker.batches(make_data(), batch_size=BATCH)
        for x, y in batches:
            loss = nn.functional.mse_loss(model(x), y)
            with worker.average():
                for use in (worker.step, worker.skip, lambda: next(batches), worker.average):
                    with pytest.raises(UsageError, match=r"test_average\.py:\d+: .* inside `with worker\.average\(\)`"):
                        use()
                with pytest.raises(UsageError, match=r"backward\(\) inside `with worker\.average\(\)`"):
                    nn.functional.mse_loss(model(x), y).backward()
            with pytest.raises(UsageError, match=r"2\.weight was written"), worker.average(), torch.no_grad():
                model[2].weight.mul_(2)
            break
        del loss


def test_a_job_has_the_average_it_began_with(job: str, site: Site) -> None:
    for value in (0.9, "ema"):
        with pytest.raises(UsageError, match=r"give psa\.ema"):
            psa.Worker(job, make_model(), optimizer=psa.optim.SGD(lr=0.1), average=value)  # type: ignore[arg-type]
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(UsageError, match="decay"):
            psa.ema(decay)
    with worker_of(job, make_model()):
        pass
    for other in (0.5, None):
        with (
            pytest.raises(JobMismatch, match=r"exists with average=\{'decay': 0\.9\}"),
            worker_of(job, make_model(), other),
        ):
            pass
    with worker_of(f"{job}-without", make_model(), None):
        pass
    mismatches = {
        (job, 0.5): r"exists with average=\{'decay': 0\.9\}",
        (job, None): r"exists with average=\{'decay': 0\.9\}, this process has average=None",
        (f"{job}-without", 0.9): r"exists without an average.*leave average= out",
    }
    for (name, decay), words in mismatches.items():
        with pytest.raises(JobMismatch, match=words), worker_of(name, make_model(), decay):
            pass
    with psa.Store(f"{job}-without") as store, pytest.raises(UsageError, match="keeps no average"):
        store.state_dict(average=True)
    with psa.Store(job) as store:
        initial = store.state_dict(0, average=True)
    assert all(torch.equal(initial[name], tensor) for name, tensor in make_model().state_dict().items())


@pytest.mark.parametrize("mode", ["local:steps=3", "async", "ssp:staleness=2", "sync:speculate"])
def test_in_other_modes_it_is_that_of_one_version(job: str, mode: str) -> None:
    """What is shown is what is stored at that version, after each evaluation."""
    model, seen = make_model(), dict[int, dict[str, Tensor]]()
    with worker_of(job, model, mode=mode) as worker:
        for x, y in worker.batches(make_data(), batch_size=BATCH):
            nn.functional.mse_loss(model(x), y).backward()
            worker.step()
            before = copies(model)
            with worker.average() as step:
                shown = copies(model)
            if mode.startswith(("local", "sync")):  # in the others, two versions may have as many whole steps
                assert all(torch.equal(tensor, seen.get(step, shown)[name]) for name, tensor in shown.items())
            seen[step] = shown
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        with worker.average() as step:
            assert step == STEPS
            seen[step] = copies(model)
    with psa.Store(job) as store:
        stored = store.state_dict(average=True)
    assert all(torch.equal(stored[name], tensor) for name, tensor in seen[STEPS].items())
    assert len(seen) > 2
