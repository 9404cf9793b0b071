"""The seq2seq example as a user runs it: each task, with what is on every machine; a killed worker; bad input."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch

import psa_store
from psa_store.examples import seq2seq
from tests.harness import Run, Site
from tests.performance.workloads import plain_loop

for package in ("rouge_score", "sacrebleu", "tokenizers"):
    pytest.importorskip(package)

SCRIPT = Path(psa_store.__file__).parent / "examples" / "seq2seq.py"
HELD = Path(__file__).parent / "seq2seq_job.py"
STEPS = 20
TINY = (
    *("--layers=1", "--heads=2", "--width=16", "--vocabulary=300", "--batch-size=2", "--warmup=5", "--lr=5e-3"),
    *("--source-max=48", "--target-max=32", "--measure=4", "--beam=2", f"--steps={STEPS}"),
)
SCORES = {"translate": r"chrF [\d.]+, BLEU [\d.]+", "summarise": r"ROUGE-L [\d.]+", "answer": r"exact match [\d.]+, F1"}


def start(site: Site, task: str, job: str, *extra: str, script: Path = SCRIPT, **options: object) -> Run:
    defaults: dict[str, object] = {"workers": 1, "servers": 1}
    return site.run(job, f"--task={task}", "--ranks=2", *TINY, *extra, script=script, **{**defaults, **options})


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> Run:
    """One worker computes both ranks of a job that answers."""
    run = start(site, "answer", "seq2seq-answer")
    assert run.finish() == 0, run.output
    return run


def shows_a_report(task: str, output: str) -> bool:
    samples = r"(\nread +\S.*\nexpected +\S.*\nwritten .*\n){3}\njob seq2seq-"
    pattern = rf"validation loss \d\.\d+ \(\d+ tokens\)\n{SCORES[task]}.* \(4 examples\)\n{samples}"
    return re.search(pattern, output) is not None


@pytest.mark.parametrize("task", ["translate", "summarise"])
def test_a_task_trains_with_what_is_on_every_machine(site: Site, task: str) -> None:
    run = start(site, task, f"seq2seq-{task}")
    assert run.finish() == 0, run.output
    assert shows_a_report(task, run.output), run.output
    assert re.search(r"training with \d+ examples; \d+ sources and \d+ targets were longer", run.output), run.output


def test_the_loss_is_that_of_a_plain_loop_with_the_same_batches(undisturbed: Run) -> None:
    assert shows_a_report("answer", undisturbed.output), undisturbed.output
    torch.set_num_threads(1)
    options = seq2seq.parse_options(["--task=answer", *TINY])
    work = seq2seq.build(options)
    before = seq2seq.evaluate(work.model, work.validation).loss
    plain_loop(options, work, lambda *_: None, ranks=2)
    after = seq2seq.evaluate(work.model, work.validation).loss
    found = re.search(r"validation loss (\S+)", undisturbed.output)
    assert found is not None
    assert float(found[1]) == pytest.approx(after, abs=3e-4)
    assert before - after > 0.1


def test_a_killed_worker_changes_no_bit(site: Site, undisturbed: Run) -> None:
    job = "seq2seq-killed"
    run = start(site, "answer", job, script=HELD, workers=2, held=True)
    run.wait_for_step(5)
    os.kill(site.pids(job, "workers")[0], signal.SIGKILL)
    run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    assert site.digest(job, STEPS) == site.digest("seq2seq-answer", STEPS)


def test_a_resume_with_other_data_is_refused_in_one_line(site: Site, tmp_path: Path, undisturbed: Run) -> None:
    """As many examples and tokens as the job has, so nothing else would tell."""
    data = tmp_path / "other.tsv"
    examples = len(seq2seq.load_pairs("answer", None, None).training)
    data.write_text("".join(f"what is {n}?\t{n} is a number {n * n:b}\tnumber\n" for n in range(examples)))
    run = start(site, "answer", "seq2seq-answer", f"--data={data}", f"--valid={data}", f"--steps={STEPS + 1}")
    assert run.finish() == 2, run.output
    assert "job seq2seq-answer has other tokens than were learnt here: give the --data" in run.output


def test_a_bad_file_ends_the_run_in_one_line(site: Site, tmp_path: Path) -> None:
    (tmp_path / "bad.tsv").write_text("only a text\n")
    run = start(site, "translate", "seq2seq-bad", f"--data={tmp_path / 'bad.tsv'}")
    assert run.finish() == 2, run.output
    assert "bad.tsv, line 1: 1 columns. --task translate needs, between tabs: text, translation." in run.output
    assert "Traceback" not in run.output
