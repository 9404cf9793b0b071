"""Time per step of the GPT example: as a plain loop, under psa, and under psa without commits. ::

    python -m tests.performance.gpt_step --data shakespeare.txt --rounds 5 --steps 300

The plain loop is one process with two threads; psa runs two workers of one thread each and one server. All three
see the same samples in the same order and apply the same update. Rounds interleave them, so that a machine that
slows down slows all of them down; ratios are taken within a round. Only steps after the twentieth are timed, and
the last evaluation and the sample are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import default_collate

from psa_store.errors import PsaError, UsageError, UserCodeFailed
from psa_store.examples import gpt
from psa_store.examples.progress import StepTimer
from psa_store.job.sampling import sample_indices
from psa_store.optim import AdamW, Schedule
from tests.performance.common import private_servers, summary

PLAIN_THREADS = 2
WORKERS = 2
START_TIMEOUT_S = 20.0
RUN_TIMEOUT_S_PER_STEP = 1.0
RUN_TIMEOUT_S_BASE = 120.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train. ``environment``: what it adds to that of the benchmark."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]


def plain_loop(
    options: argparse.Namespace,
    model: gpt.GPT,
    training: gpt.TextWindows,
    on_step: Callable[[int, float], None],
) -> None:
    """Train as any script without psa would, on the samples and with the numbers that psa would use.

    ``on_step`` is called with the number of steps done and the loss of the last.
    """
    rule = gpt.build_optimizer(options)
    assert isinstance(rule.lr, Schedule) and rule.clip_grad_norm is not None
    optimizer = torch_optimizer(model, rule)
    for step in range(options.steps):
        indices = sample_indices(options.seed, step, 0, ranks=1, batch_size=options.batch_size, n=len(training))
        loss = model.loss(default_collate([training[index] for index in indices]))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), rule.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rule.lr.at(step)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1, loss.item())


def torch_optimizer(model: nn.Module, rule: AdamW) -> torch.optim.AdamW:
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if rule.group_of(name, p.shape) == index],
            "weight_decay": rule.in_group(index).weight_decay,
        }
        for index in range(len(rule.groups) + 1)
    ]
    return torch.optim.AdamW(groups, betas=(rule.betas[0], rule.betas[1]), eps=rule.eps, fused=True)


def run_plain(options: argparse.Namespace) -> None:
    """The plain loop as a program: print the validation loss, and write the timing if asked to."""
    torch.set_num_threads(options.threads)
    text = gpt.load_text(options.data)
    vocabulary = gpt.Vocabulary.of(text, force_bytes=options.bytes)
    training, validation = gpt.split(vocabulary.encode(text), options.block)
    model = gpt.build_model(options, vocabulary)
    timer = StepTimer()
    plain_loop(options, model, training, lambda step, _: timer.passed(step, workers=1))
    if options.timing:
        timer.write(options.timing)
    if options.eval_batches:
        print(gpt.evaluate(model, validation, options.eval_batches))


def variants(data: Path | None, steps: int) -> tuple[Variant, ...]:
    """What is compared; the first is what the others are measured against."""
    text = (f"--data={data.resolve()}",) if data else ()
    common = (f"--steps={steps}", "--eval-batches=0", "--sample=0", *text)
    plain = (sys.executable, "-m", "tests.performance.gpt_step", "plain", f"--threads={PLAIN_THREADS}")
    psa = (sys.executable, "-m", "psa_store.cli", "run", "--no-label", f"--workers={WORKERS}", "--servers=1")
    example = (str(Path(gpt.__file__)), f"--ranks={WORKERS}", "--threads=1")
    return (
        Variant("plain loop", plain + common, {}),
        Variant("psa without commits", psa + example + common, {"PSA_COMMIT_EVERY": "0"}),
        Variant("psa", psa + example + common, {}),
    )


def measure(data: Path | None, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every variant in every round. Every second round goes the other way round."""
    found: dict[str, list[float]] = {variant.name: [] for variant in variants(data, steps)}
    with private_servers() as servers:
        for index in range(rounds):
            for variant in variants(data, steps)[:: -1 if index % 2 else 1]:
                run = servers.home / f"{index}-{variant.name.replace(' ', '-')}"
                step_s = _time(variant, servers.env, run, RUN_TIMEOUT_S_BASE + steps * RUN_TIMEOUT_S_PER_STEP)
                found[variant.name].append(step_s)
                print(f"round {index + 1}: {variant.name:<20} {1e3 * step_s:7.2f} ms per step", flush=True)
    return found


def report(found: Mapping[str, Sequence[float]]) -> str:
    """A table: median and spread of the time per step, and of the ratios to each other variant before it."""
    lines = [f"{'':<20}  ms per step: median (least to most)"]
    for name, times in found.items():
        lines.append(f"{name:<20}  {summary([1e3 * time for time in times], '.2f')}")
    lines += ["", f"{'ratio':<38}  median (least to most), each within one round"]
    names = list(found)
    for below, name in ((b, n) for i, n in enumerate(names) for b in names[:i]):
        ratios = [time / base for time, base in zip(found[name], found[below], strict=True)]
        lines.append(f"{f'{name} / {below}':<38}  {summary(ratios, '.3f')}")
    return "\n".join(lines)


def _time(variant: Variant, environment: Mapping[str, str], run: Path, timeout_s: float) -> float:
    """Run a variant once, as a job of its own; its seconds per step."""
    timing = run.with_suffix(".json")
    command = [*variant.command, f"--job={run.name}", f"--timing={timing}"]
    log = run.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**environment, **variant.environment}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise UserCodeFailed(
                f"{variant.name}: not done after {timeout_s:.0f} s. The end of its log:\n{_tail(log)}"
            ) from error
        finally:
            _stop(process)
    if code != 0 or not timing.exists():
        raise UserCodeFailed(f"{variant.name}: exit code {code}. The end of its log:\n{_tail(log)}")
    document = json.loads(timing.read_text())
    if variant.name != "plain loop" and document["workers"] != WORKERS:
        raise UserCodeFailed(f"{variant.name}: ran with {document['workers']} of {WORKERS} workers for a while")
    return float(document["seconds"]) / int(document["steps"])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a run that is still going on, gently first, so that `psa run` ends its own processes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def main(arguments: Sequence[str]) -> None:
    """``plain …`` runs the plain loop with the options of the example; anything else compares."""
    if arguments and arguments[0] == "plain":
        run_plain(gpt.parse_options(arguments[1:]))
        return
    parser = argparse.ArgumentParser(prog="python -m tests.performance.gpt_step", description=main.__doc__)
    parser.add_argument("--data", type=Path, help="text to learn (default: that of the example)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.steps <= StepTimer.AFTER_STEP or options.rounds < 1:
        raise UsageError(f"use more than {StepTimer.AFTER_STEP} steps and at least one round")
    print("\n" + report(measure(options.data, options.steps, options.rounds)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PsaError as error:
        print(f"gpt_step: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
