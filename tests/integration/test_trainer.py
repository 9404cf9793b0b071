"""transformers' Trainer over psa, with the real package: the Trainer's numbers, and the same bits whatever dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import psa_store as psa
from psa_store.checkpoint.catalog import read_job
from psa_store.errors import UsageError
from tests.harness import PATIENCE_S, Run, Site

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("peft")
from transformers import Trainer, TrainingArguments

from psa_store.integrations.transformers import PsaTrainer

SCRIPT = Path(__file__).parent / "trainer_job.py"
KINDS = ["gpt2", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("t5", "bert", "lora"))]
"""Each takes half a minute, mostly to import transformers: one model stands for the others."""


def train(site: Site, job: str, out: Path, *arguments: str, workers: int = 2, ranks: int = 2) -> Run:
    run = site.run(
        job, "--out", str(out), *arguments, script=SCRIPT, workers=workers, servers=1, ranks=ranks, commit_every=3
    )
    assert run.finish() == 0, run.output
    return run


def told(run: Run) -> list[str]:
    """What was logged of training, once each: after a death a step is logged again."""
    return sorted({line for line in run.lines if line.startswith(("logged", "done"))})


def newest(site: Site, job: str) -> int:
    with closing(site.store()) as store:
        return read_job(store, job).version_of(None)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_the_trainer_does(site: Site, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with micro-batches, clip, decay, warm-up and token counts, beside one process with the whole batch."""
    common = ["--kind", kind, "--no-dropout", "--count", "48", "train_sampling_strategy=sequential"]
    if kind == "t5":  # it takes the mean over a micro-batch, whatever the Trainer tells it of the others
        common.append("gradient_accumulation_steps=1")
    job = f"as-trainer-{kind}"
    run = train(site, job, tmp_path / "psa", *common)
    plain = subprocess.run(
        [sys.executable, SCRIPT, "--plain", "--out", tmp_path / "plain", *common, "per_device_train_batch_size=4"],
        env={**os.environ, "PSA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert plain.returncode == 0, plain.stderr
    rates = [[line.split()[i] for i in (1, 3)] for line in told(run) if line.startswith("logged")]
    theirs = [[line.split()[i] for i in (1, 3)] for line in plain.stdout.splitlines() if line.startswith("logged")]
    assert sorted(theirs) == rates, "the learning rates"
    from safetensors.torch import load_file

    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    ours, expected = load_file(tmp_path / "psa" / name), load_file(tmp_path / "plain" / name)
    assert ours.keys() == expected.keys()
    for key in ours:
        torch.testing.assert_close(
            ours[key], expected[key], rtol=2e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    monkeypatch.setenv("PSA_REDIS", site.redis)
    stored = psa.Store(job).state_dict()
    assert kind == "lora" or all(torch.equal(stored[key], ours[key]) for key in ours)
    exported = tmp_path / "exported"
    done = site.told("checkpoint", "export", job, exported)
    assert done.returncode == 0, done.stderr
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    for name in tokenizer if kind == "lora" else {*tokenizer, "config.json"}:
        assert (exported / name).read_bytes() == (tmp_path / "psa" / name).read_bytes(), "as save_model writes it"


@pytest.mark.parametrize("kind", [pytest.param("t5", marks=pytest.mark.long), "lora"])
def test_the_bits_and_the_log_are_the_same_if_a_worker_dies(site: Site, tmp_path: Path, kind: str) -> None:
    alone = train(site, f"alone-{kind}", tmp_path / "alone", "--kind", kind, workers=1)
    killed = train(
        site, f"killed-{kind}", tmp_path / "killed", "--kind", kind, "--die-at", "5", "--note", str(tmp_path / "note")
    )
    assert (tmp_path / "note").exists() and "a process died" in killed.output
    assert site.digest(f"alone-{kind}", 12) == site.digest(f"killed-{kind}", 12)
    assert told(alone) == told(killed)


@pytest.mark.long
def test_early_stopping_and_the_best_model_survive_a_death(site: Site, tmp_path: Path) -> None:
    """The patience is what it was: evaluations before the death count once."""
    flags = ["--patience", "2", "eval_strategy=steps", "eval_steps=2", "save_strategy=steps", "save_steps=2"]
    flags += ["metric_for_best_model=loss", "load_best_model_at_end=True", "max_steps=60", "learning_rate=0.05"]
    flags += ["lr_scheduler_type=constant", "weight_decay=0", "greater_is_better=False"]
    alone = train(site, "stops", tmp_path / "alone", *flags, workers=1)
    (done,) = [line for line in told(alone) if line.startswith("done")]
    stopped = int(done.split()[1])
    assert 4 < stopped < 60, done
    die = ["--die-at", str(stopped - 1), "--note", str(tmp_path / "note")]
    killed = train(site, "stops-killed", tmp_path / "killed", *flags, *die)
    assert (tmp_path / "note").exists()
    assert done in told(killed)
    assert site.digest("stops", stopped) == site.digest("stops-killed", stopped)
    folders = [{each.name for each in (tmp_path / name).glob("checkpoint-*")} for name in ("alone", "killed")]
    assert folders[0] == folders[1] != set()
    state = json.loads((tmp_path / "killed" / f"checkpoint-{stopped}" / "trainer_state.json").read_text())
    assert state["best_global_step"] == stopped - 4
    weights = [
        (tmp_path / "killed" / name / "model.safetensors").read_bytes() for name in ("", f"checkpoint-{stopped - 4}")
    ]
    assert weights[0] == weights[1], "the best model was loaded at the end, and saved"
    again = train(site, "stops-killed", tmp_path / "killed", *flags)
    assert done in told(again) and newest(site, "stops-killed") == stopped, "it stops again where it stopped"


@pytest.mark.long
def test_the_same_command_resumes_and_checkpoint_folders_are_understood(site: Site, tmp_path: Path) -> None:
    flags = ["save_strategy=steps", "save_steps=4"]
    whole = train(site, "trainer-whole", tmp_path / "whole", *flags)
    run = site.run(
        "trainer-parts", "--out", str(tmp_path / "out"), *flags, "--die-at", "7", "--note", str(tmp_path / "note"),
        script=SCRIPT, workers=2, servers=1, ranks=2, commit_every=3, max_restarts=0,
    )  # fmt: skip
    assert run.finish() != 0
    at = newest(site, "trainer-parts")
    assert 4 <= at <= 8
    older = site.run(
        "trainer-parts", "--out", str(tmp_path / "out"), *flags, "--resume", str(tmp_path / "out" / "checkpoint-1"),
        script=SCRIPT, workers=1, servers=1, ranks=2, commit_every=3,
    )  # fmt: skip
    assert older.finish() == 2 and f"is at version {at}" in older.output
    assert "psa checkpoint rollback trainer-parts 1" in older.output
    again = train(site, "trainer-parts", tmp_path / "out", *flags, "--resume", "True")
    assert site.digest("trainer-parts", 12) == site.digest("trainer-whole", 12)
    assert [line for line in told(whole) if "done" in line] == [line for line in told(again) if "done" in line]
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    once_more = train(site, "trainer-parts", tmp_path / "out", *flags, workers=1)
    assert [line for line in told(once_more) if "done" in line] == [line for line in told(again) if "done" in line]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before, (
        "a run that finds all done saves what is there"
    )
    state = json.loads((tmp_path / "out" / "checkpoint-12" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [4, 8, 12]


def make(tmp_path: Path, **arguments: Any) -> PsaTrainer:
    return PsaTrainer(
        model=torch.nn.Linear(2, 1),
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **arguments),
        train_dataset=[{"x": 1}],
        eval_dataset=[{"x": 1}],
        job="refused",
    )


def test_what_psa_can_not_follow_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="auto_find_batch_size=True: the batch size belongs to the job"):
        make(tmp_path, auto_find_batch_size=True)
    with pytest.raises(UsageError, match="optimizer=Adafactor: it keeps means of rows"):
        make(tmp_path, optim="adafactor")._psa_optimizer(10)
    plateau = make(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)
    with pytest.raises(UsageError, match="lr_scheduler ReduceLROnPlateau: servers need a rate"):
        plateau._psa_optimizer(10)
    with pytest.raises(UsageError, match="job has no name"):
        PsaTrainer(model=torch.nn.Linear(2, 1), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))


@pytest.mark.parametrize(
    "kind",
    [
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ],
)
def test_each_schedule_of_transformers_gives_its_rates(tmp_path: Path, kind: str) -> None:
    more: dict[str, Any] = {
        "cosine_with_min_lr": {"min_lr": 1e-4},
        "warmup_stable_decay": {"num_decay_steps": 50},
    }
    trainer = make(
        tmp_path, lr_scheduler_type=kind, warmup_steps=10, learning_rate=3e-3, lr_scheduler_kwargs=more.get(kind, {})
    )
    ours = trainer._psa_optimizer(200)
    scheduler = Trainer.create_scheduler(make_plain(trainer), 200)
    for step in range(200):
        assert trainer._schedule.at(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-7, abs=1e-14), step
        scheduler.optimizer.step()
        scheduler.step()
    assert ours.clip_grad_norm == 1.0, "the default of max_grad_norm"


def make_plain(trainer: PsaTrainer) -> Trainer:
    plain = Trainer(model=torch.nn.Linear(2, 1), args=trainer.args)
    plain.create_optimizer()
    return plain
