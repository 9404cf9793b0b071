"""Accelerate's loop over psa, with the real package: its numbers, and the same bits whatever dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from psa_store.errors import UsageError
from tests.harness import Servers, Site

pytest.importorskip("accelerate")
from psa_store.integrations.accelerate import PsaAccelerator
from tests.integration import accelerate_job
from tests.integration.accelerate_job import accelerator_of, data, make_model, train

SCRIPT = Path(accelerate_job.__file__)


@pytest.fixture(autouse=True)
def environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**site.env, "PSA_RANKS": "2"}.items():
        monkeypatch.setenv(name, value)


def fit(site: Site, job: str, dropout: float) -> nn.Module:
    """Train in this process, both ranks."""
    servers = Servers(site, job, 1)
    with accelerator_of(job) as accelerator:
        model = train(accelerator, 4, dropout)
        assert accelerator.worker.finished and accelerator.is_main_process
    assert accelerator.is_main_process and accelerator.num_processes == 2
    servers.stop()
    return model


def said(text: str, *kinds: str) -> list[str]:
    """What was said, once each: after a death it is said again."""
    return sorted({line for line in text.splitlines() if line.startswith(kinds)})


def test_it_trains_as_accelerate_does(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks beside one process with the whole batch: parameters, rates, evaluations."""
    ours = fit(site, "accelerate-as", 0.0)
    psa_said = said(capfd.readouterr().out, "rate", "pass")
    theirs = train(accelerator_of(None), 8, 0.0)
    assert psa_said == said(capfd.readouterr().out, "rate", "pass")
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_the_bits_are_the_same_if_a_worker_dies(site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit(site, "accelerate-alone", 0.2)
    alone = said(capfd.readouterr().out, "rate", "pass 1")
    run = site.run(
        "accelerate-killed", "--die-at", "8", "--note", str(tmp_path / "note"),
        script=SCRIPT, workers=2, servers=2, ranks=2, commit_every=3,
    )  # fmt: skip
    assert run.finish() == 0, run.output
    assert (tmp_path / "note").exists() and "a process died" in run.output
    assert site.digest("accelerate-alone", 12) == site.digest("accelerate-killed", 12)
    assert said(run.output, "pass 1") == alone[:1]
    assert "done 12" in run.output, "also said by a process that starts again when all is done"


def prepared(accelerator: PsaAccelerator) -> Any:
    model = make_model(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    return accelerator.prepare(model, optimizer, DataLoader(data(), batch_size=4), scheduler)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4: .*psa run --ranks N"),
        ({"job": None}, "the job has no name: PsaAccelerator"),
    ],
)
def test_arguments_that_psa_can_not_follow_are_refused_by_name(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        PsaAccelerator(**{"job": "refused", "cpu": True, **arguments})


def test_calls_that_psa_can_not_follow_are_refused_by_name(site: Site) -> None:
    accelerator = PsaAccelerator("refused", cpu=True)
    with pytest.raises(UsageError, match="write `with PsaAccelerator"):
        prepared(accelerator)
    for call, says in (
        (lambda: accelerator.prepare(make_model(0.0)), "give one model, its optimizer and the train dataloader"),
        (lambda: accelerator.clip_grad_norm_([], 1.0), r"PsaAccelerator\(…, clip_grad_norm=1.0\)"),
        (lambda: accelerator.clip_grad_value_([], 1.0), "clip_grad_value_: it would clip each rank's gradient"),
        (accelerator.save_state, "save_state: servers commit all of it"),
        (accelerator.load_state, "load_state: a job goes on by itself"),
        (lambda: accelerator.skip_first_batches(None, 3), "skip_first_batches: the job knows its place"),
    ):
        with pytest.raises(UsageError, match=says):
            call()
    with accelerator, pytest.raises(UsageError, match=r"StepLR: .*step_scheduler_with_optimizer=False"):
        prepared(accelerator)


def test_what_shows_in_a_step_is_refused_there(site: Site) -> None:
    servers = Servers(site, "accelerate-refused", 1)
    more: dict[str, Any] = {"cpu": True, "step_scheduler_with_optimizer": False}
    with PsaAccelerator("accelerate-refused", **more) as accelerator:
        model, optimizer, loader, _ = prepared(accelerator)
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            with pytest.raises(UsageError, match="gather, gather_for_metrics, reduce: there is no process group"):
                accelerator.gather(loss)
            optimizer.param_groups[0]["lr"] = 1.0
            with pytest.raises(UsageError, match=r"lr of the optimizer's group 0 was changed from 0\.1 to 1\.0"):
                optimizer.step()
            break
    with PsaAccelerator("accelerate-refused", **more) as accelerator:
        model, optimizer, loader, scheduler = prepared(accelerator)
        for x, y in loader:
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
        with pytest.raises(UsageError, match=r"scheduler.step\(\) after 12 calls of optimizer.step"):
            scheduler.step()
    servers.stop()
