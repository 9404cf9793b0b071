"""Lightning's Trainer over psa, with the real package: the Trainer's numbers, and the same bits whatever dies."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import psa_store as psa
from psa_store.errors import UsageError
from tests.harness import Servers, Site

pytest.importorskip("lightning")
import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging

from psa_store.integrations.lightning import PsaStrategy
from tests.integration import lightning_job
from tests.integration.lightning_job import Module, data, main

SCRIPT = Path(lightning_job.__file__)
KINDS = ("step", "validated", "done")


@pytest.fixture(autouse=True)
def environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**site.env, "PSA_RANKS": "2", "PSA_JOB": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def fit(site: Site, job: str, out: Path, *arguments: str, servers: int = 1) -> tuple[L.Trainer, Module]:
    """Train in this process, both ranks."""
    started = Servers(site, job, servers)
    done = main(["--job", job, "--out", str(out), *arguments])
    started.stop()
    return done


def said(text: str) -> list[str]:
    """What was said, once each: all processes say it, and after a death it is said again."""
    return sorted({line for line in text.splitlines() if line.startswith(KINDS)})


def test_the_bits_are_the_same_if_a_worker_dies(site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Dropout, a scheduler, clipping, validation, and a callback that keeps the best model.

    Both write to one folder, since the callback knows its name.
    """
    fit(site, "light-alone", tmp_path / "out")
    alone = said(capfd.readouterr().out)
    assert "done 12 epoch 2" in "\n".join(alone)
    run = site.run(
        "light-killed", "--out", str(tmp_path / "out"), "--die-at", "8", "--note", str(tmp_path / "note"),
        script=SCRIPT, workers=2, servers=2, ranks=2, commit_every=3,
    )  # fmt: skip
    assert run.finish() == 0, run.output
    assert (tmp_path / "note").exists() and "a process died" in run.output
    assert site.digest("light-alone", 12) == site.digest("light-killed", 12)
    assert alone == said(run.output)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_it_trains_as_the_trainer_does(
    site: Site, tmp_path: Path, interval: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks beside one process with the whole batch: parameters, rates, epochs, validations, the best model."""
    loader = DataLoader

    def in_order(*arguments: Any, **named: Any) -> DataLoader[Any]:
        return loader(*arguments, **{**named, "shuffle": False})

    monkeypatch.setattr(lightning_job, "DataLoader", in_order)
    flags = ["--dropout", "0", "--interval", interval]
    trainer, ours = fit(site, f"light-as-{interval}", tmp_path / "psa", *flags)
    psa_said = said(capfd.readouterr().out)
    plain, theirs = main(["--out", str(tmp_path / "plain"), *flags, "--batch", "8"])
    assert psa_said == said(capfd.readouterr().out)
    assert (trainer.global_step, trainer.current_epoch) == (plain.global_step, plain.current_epoch) == (12, 2)
    assert trainer.gradient_clip_val == 0.5, "it is the Trainer's again"
    for (name, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    saved = torch.load(tmp_path / "psa" / "last.ckpt", weights_only=False)
    assert saved["psa"] == {"job": f"light-as-{interval}", "version": 12}
    assert all(torch.equal(saved["state_dict"][name], each) for name, each in ours.state_dict().items())
    Module.load_from_checkpoint(tmp_path / "psa" / "last.ckpt")


def test_it_ends_where_the_job_was_set_to_end(site: Site, tmp_path: Path) -> None:
    """Its epochs are counted by the batches of the loader, so those can not be set. The rate that was set is shown."""

    def set_number(*numbers: str) -> None:
        done = site.psa("job", "set", "light-set", *numbers, "--yes")
        assert done.finish() == 0, done.output

    fit(site, "light-set", tmp_path, "--epochs", "1")
    set_number("steps=14", "lr=0.005")
    trainer, _ = fit(site, "light-set", tmp_path, "--epochs", "1")
    assert trainer.global_step == 14
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.005
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.005]
    set_number("batch_size=16")
    with pytest.raises(UsageError, match="`psa job set light-set batch_size=8`"):
        main(["--job", "light-set", "--out", str(tmp_path)])


@pytest.mark.long
def test_early_stopping_survives_a_death_and_stops_again_where_it_stopped(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The patience is what it was: validations before the death count once."""
    flags = ["--epochs", "40", "--patience", "2", "--interval", "epoch"]
    trainer, _ = fit(site, "light-stops", tmp_path / "out", *flags)
    stopped = trainer.global_step
    assert 12 < stopped < 240 and stopped % 6 == 0
    alone = said(capfd.readouterr().out)
    run = site.run(
        "light-stops-killed", "--out", str(tmp_path / "out"), *flags,
        "--die-at", str(stopped - 3), "--note", str(tmp_path / "note"),
        script=SCRIPT, workers=2, servers=2, ranks=2, commit_every=3,
    )  # fmt: skip
    assert run.finish() == 0, run.output
    assert (tmp_path / "note").exists()
    assert site.digest("light-stops", stopped) == site.digest("light-stops-killed", stopped)
    assert alone == said(run.output)
    again, _ = fit(site, "light-stops", tmp_path / "out", *flags)
    assert again.global_step == stopped


@pytest.mark.long
def test_the_same_script_resumes_and_a_file_of_another_job_is_refused(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(site, "light-whole", tmp_path / "out")
    whole = said(capfd.readouterr().out)
    run = site.run(
        "light-parts", "--out", str(tmp_path / "out"), "--die-at", "7", "--note", str(tmp_path / "note"),
        script=SCRIPT, workers=1, servers=1, ranks=2, commit_every=3, max_restarts=0,
    )  # fmt: skip
    assert run.finish() != 0
    last = str(tmp_path / "out" / "last.ckpt")
    _, module = fit(site, "light-parts", tmp_path / "out", "--ckpt", last)
    resumed = said(capfd.readouterr().out)
    assert resumed[0] == whole[0] and set(resumed) < set(whole), "it does not begin at step 0"
    assert site.digest("light-whole", 12) == site.digest("light-parts", 12)
    _, once_more = fit(site, "light-parts", tmp_path / "out")
    assert said(capfd.readouterr().out) == [each for each in whole if each.startswith(("done", "validated 12"))]
    assert all(
        torch.equal(left, right) for left, right in zip(once_more.parameters(), module.parameters(), strict=True)
    )
    with pytest.raises(UsageError, match=r"fit\(ckpt_path=.*no optimizer state that job 'light-other' could go on"):
        main(["--job", "light-other", "--out", str(tmp_path / "out"), "--ckpt", last])


def trainer_of(**arguments: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", **{"strategy": PsaStrategy("refused"), "max_steps": 4, **quiet, **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"accumulate_grad_batches": 4}, r"accumulate_grad_batches=4: .*psa run --workers 1 --ranks 4"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "gradient_clip_algorithm='value': servers"),
        ({"devices": 2}, "2 devices in one process: start one worker a device"),
        ({"num_nodes": 2}, "num_nodes=2"),
        ({"sync_batchnorm": True}, "sync_batchnorm=True: buffers are those of rank 0"),
        ({"limit_train_batches": 3}, "limit_train_batches=3: .*Subset"),
        ({"overfit_batches": 1}, "overfit_batches=1: give a smaller data set"),
        ({"fast_dev_run": 1}, "fast_dev_run=True: use it with a Trainer without this strategy"),
        ({"max_time": "00:01:00:00"}, "Timer: each process has a time of its own: give max_steps"),
        ({"callbacks": StochasticWeightAveraging(0.1)}, "StochasticWeightAveraging: servers keep an average"),
        ({"strategy": PsaStrategy()}, "the job has no name: PsaStrategy"),
    ],
)
def test_arguments_that_psa_can_not_follow_are_refused_by_name(
    arguments: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PSA_JOB")
    with pytest.raises(UsageError, match=says):
        trainer_of(**arguments).fit(Module(), DataLoader(data(), batch_size=4))


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Steps(Module):
    def optimizer_step(self, *arguments: Any, **named: Any) -> None: ...


class Clips(Module):
    def configure_gradient_clipping(self, *arguments: Any, **named: Any) -> None: ...


class Plateau(Module):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Muon(Module):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Manual, "automatic_optimization=False: let training_step return the loss. For two optimizers"),
        (Steps, "Steps.optimizer_step: servers make the step"),
        (Clips, r"Clips.configure_gradient_clipping: it would clip each rank's .* Trainer\(gradient_clip_val=…\)"),
        (Plateau, "lr_scheduler=ReduceLROnPlateau: its rates depend on results"),
        (Muon, "optimizer=Adafactor: it keeps means of rows"),
    ],
)
def test_modules_that_psa_can_not_follow_are_refused_by_name(module: type[Module], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        trainer_of().fit(module(), DataLoader(data(), batch_size=4))


class Syncs(Module):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("synced", loss, sync_dist=True)
        return loss


class Gathers(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.all_gather(batch[0])


class ChangesRate(Module):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 1.0


class SkipsSome(Module):
    """No loss for one rank's first batch."""

    seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return None if self.seen == 1 else super().training_step(batch, batch_idx)


def test_what_shows_in_a_step_is_refused_there_and_none_leaves_a_batch_out(site: Site) -> None:
    job = "light-in-a-step"
    servers = Servers(site, job, 1)
    stops = EarlyStopping("train_loss")
    refused: list[tuple[Module, dict[str, Any], str]] = [
        (Syncs(), {}, r"self.log\('synced', sync_dist=True\) while training: there is no process group"),
        (Gathers(), {}, "all_gather: there is no process group"),
        (ChangesRate(), {}, "lr of the optimizer's group 0 was changed"),
        (Module(), {"callbacks": stops}, r"EarlyStopping\(monitor='train_loss'\): training_step logs it"),
    ]
    for module, arguments, says in refused:
        with pytest.raises(UsageError, match=says):
            trainer_of(strategy=PsaStrategy(job), **arguments).fit(
                module, DataLoader(data(), batch_size=4), DataLoader(data(), batch_size=4)
            )
    average = psa.ema(0.5)
    with pytest.raises(UsageError, match="average"):
        trainer_of(strategy=PsaStrategy(job, average=average)).fit(Module(), DataLoader(data(), batch_size=4))
    module = SkipsSome()
    trainer_of(strategy=PsaStrategy(job)).fit(module, DataLoader(data(), batch_size=4))
    assert module.seen == 8 and module.trainer.global_step == 4, "two ranks, four steps"
    assert all(bool(each.isfinite().all()) for each in module.parameters())
    assert nn.functional.mse_loss(module.layers[0].bias, Module().layers[0].bias) > 0
    servers.stop()
