"""Translate, summarise and answer: trained through psa with a killed worker, and by a plain loop, side by side. ::

    python -m tests.performance.workloads --task translate --minutes 15

Both train the model of the seq2seq example on the same batches with the same random numbers: psa in two workers of one
thread, one of which is killed halfway, the plain loop in this process with two threads. The number of steps is what two
workers are expected to make in ``--minutes``, judged by the first steps of the plain loop, or that of ``--steps``. The
texts are those that lie beside the checkout, in ``../shared/data``, or in the folder of ``--texts``.

Both add up floats, in another order, and where a training is steep for some steps, little differences grow. The largest
is that of the norm to which gradients are clipped: torch's own is off by some 5e-6, that of servers by 1e-8. So the
plain loop is played again with a norm in float64.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from psa_store.examples import seq2seq
from psa_store.examples.pairs import COLUMNS, collate
from psa_store.observe.status import describe
from psa_store.optim import Schedule
from psa_store.worker.batches import Batches, RankStep, seed_everything
from tests.performance.common import ROOT, Servers, private_servers
from tests.performance.gpt_step import torch_optimizer

FILES = {"translate": "translate.en-de", "summarise": "summarise.en", "answer": "answer.en"}
RANKS = 2
PLAIN_THREADS = 2
STEPS_MAX = 4000
TRIED_STEPS = 12
PLAIN_SHARE = 1.3
"""By how much a step of two workers may take longer than one of the plain loop with two threads."""
JOB = "workload"
Clip = Callable[[Iterable[nn.Parameter], float], object]
_STEP = re.compile(r"^step (\d+)/")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out of a training: the lines that the example's report prints."""

    minutes: float
    loss: str
    scores: str
    samples: str


def plain_loop(
    options: argparse.Namespace,
    work: seq2seq.Workload,
    on_step: Callable[[int, float], None],
    ranks: int = RANKS,
    clip: Clip = nn.utils.clip_grad_norm_,
) -> None:
    """Train as a script without psa would, on the batches of all ranks, one after the other.

    The gradient of a step is the mean over the tokens of all ranks. ``on_step`` is called with the number of steps done
    and their last loss; StopIteration ends the training.
    """
    rule = seq2seq.build_optimizer(options)
    assert isinstance(rule.lr, Schedule) and rule.clip_grad_norm is not None
    optimizer = torch_optimizer(work.model, rule)
    loader = DataLoader(work.training, shuffle=True, collate_fn=collate)
    with closing(Batches(loader, options.batch_size, seed=options.seed, ranks=ranks)) as batches:
        for step in range(options.steps):
            tokens, total = 0, 0.0
            for rank in range(ranks):
                batch = batches.get(RankStep(step, rank), [rank])
                seed_everything(options.seed, RankStep(step, rank), "compute")
                loss = work.model.loss(batch) * batch.tokens
                loss.backward()
                tokens, total = tokens + batch.tokens, total + loss.item()
            for parameter in work.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= tokens
            clip(work.model.parameters(), rule.clip_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = rule.lr.at(step)
            optimizer.step()
            optimizer.zero_grad()
            on_step(step + 1, total / tokens)


def clip_in_float64(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """As ``torch.nn.utils.clip_grad_norm_``, with a norm that is right to the last digits of a float32."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    for grad in grads:
        grad *= min(1.0, max_norm / (norm + 1e-6))


def run_plain(options: argparse.Namespace, clip: Clip = nn.utils.clip_grad_norm_) -> Outcome:
    """Train by the plain loop."""
    began_s = time.monotonic()
    work = seq2seq.build(options)
    plain_loop(options, work, lambda *_: None, clip=clip)
    minutes = (time.monotonic() - began_s) / 60
    written = seq2seq.write_and_measure(work, options)
    return Outcome(minutes, str(seq2seq.evaluate(work.model, work.validation)), str(written), written.samples(3))


def run_psa(arguments: Sequence[str], steps: int, servers: Servers) -> Outcome:
    """Train through psa; a worker is killed halfway."""
    command = ("run", f"--workers={RANKS}", "--servers=1", seq2seq.__file__, f"--job={JOB}", *arguments)
    began_s = time.monotonic()
    lines, ended_s, killed = [], began_s, 0
    with servers.psa(*command, f"--ranks={RANKS}") as run:
        assert run.stdout is not None
        for line in run.stdout:
            if step := _STEP.match(line):
                ended_s = time.monotonic()
                if not killed and int(step[1]) >= steps // 2:
                    killed = _kill_worker(servers)
                    print(f"killed worker {killed} at step {step[1]}", flush=True)
            else:
                lines.append(line)
        if run.wait() != 0 or not killed:
            raise SystemExit("".join([*lines, f"the run ended with {run.returncode}, killed: {killed}"]))
    text = "".join(lines)
    loss, scores, *rest = text[text.index("validation loss") :].splitlines()
    samples = "\n".join(rest[1 : rest.index(next(line for line in rest if line.startswith("job "))) - 1])
    return Outcome((ended_s - began_s) / 60, loss, scores, samples)


def _kill_worker(servers: Servers) -> int:
    with closing(servers.store()) as store:
        pid = describe(JOB, servers.settings, store).workers[0].pid
    os.kill(pid, signal.SIGKILL)
    return pid


def steps_in(minutes: float, options: argparse.Namespace) -> int:
    """How many steps two workers make in ``minutes``, at most ``STEPS_MAX``."""
    times_s = [time.monotonic()]

    def tried(step: int, _: float) -> None:
        times_s.append(time.monotonic())
        if step == TRIED_STEPS:
            raise StopIteration

    try:
        plain_loop(options, seq2seq.build(options), tried)
    except StopIteration:
        pass
    step_s = (times_s[-1] - times_s[2]) / (TRIED_STEPS - 2)  # the first ones are slower
    return max(TRIED_STEPS, min(STEPS_MAX, int(60 * minutes / (PLAIN_SHARE * step_s))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=COLUMNS, required=True)
    parser.add_argument("--minutes", type=float, default=15.0, help="most time that psa may take to train")
    parser.add_argument("--steps", type=int, help="steps to train; default: what fits into --minutes")
    parser.add_argument("--texts", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the texts")
    own, others = parser.parse_known_args()
    name = own.texts / FILES[own.task]
    data, valid = name.with_name(f"{name.name}.train.tsv"), name.with_name(f"{name.name}.test.tsv")
    if not data.exists() or not valid.exists():
        print(f"skipped: there is no {data}, or no {valid}; give the folder as --texts")
        return
    arguments = [f"--task={own.task}", f"--data={data}", f"--valid={valid}", "--measure=1000000", *others]
    torch.set_num_threads(PLAIN_THREADS)
    steps = own.steps or steps_in(own.minutes, seq2seq.parse_options(arguments))
    arguments += [f"--steps={steps}", f"--decay-steps={steps}", f"--warmup={min(100, steps // 10)}"]
    print(f"{own.task}: {steps} steps", flush=True)
    with private_servers() as servers:
        outcomes = {"psa, 2 workers, one killed": run_psa(arguments, steps, servers)}
    outcomes["plain loop, same batches"] = run_plain(seq2seq.parse_options(arguments))
    outcomes["the same, norm in float64"] = run_plain(seq2seq.parse_options(arguments), clip_in_float64)
    for how, outcome in outcomes.items():
        print(f"{how:<28}{outcome.minutes:5.1f} min  {outcome.loss}  {outcome.scores}")
    for how, outcome in outcomes.items():
        print(f"\n{how}\n\n{outcome.samples}")


if __name__ == "__main__":
    main()
