"""How long training stands still when a process is killed: ``python -m tests.performance.recovery --rounds 20``.

Starts jobs with `psa run`, kills a worker or a server with SIGKILL at random moments, and takes the time from the kill
to the next completed step, as a reader of the job's output sees it. With ``--unsupervised`` the victim was started by
`psa worker` or `psa server` alone, so that only the end of its ZooKeeper session shows its death. The reference printed
beside it is the normal time of a step in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import statistics
import time
from collections import Counter
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import psa_store as psa
from chaos.history import read_history
from psa_store.observe.status import describe
from tests.performance.common import Servers, StepTimes, private_servers

SESSION_TIMEOUT_S = 4.0
STEP_S = 0.02
IN_FLIGHT = 2
"""Steps that may still end, or begin to, without what was killed."""
WARM_UP_STEPS = 30
SETTLE_STEPS = 60
"""Steps between two kills: the restarted process is back by then."""
_ENOUGH_STEPS = 1_000_000
_PATIENCE_S = 60.0


class Stage(nn.Module):
    """A part of the model that :func:`train` has, by the index of its layer; the last one has what follows, too."""

    def __init__(self, name: str, inputs: int, outputs: int, is_last: bool) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(inputs, outputs))
        self.name, self.is_last = name, is_last

    def forward(self, carry: Tensor | None, microbatch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = microbatch
        time.sleep(STEP_S / 4)  # what a larger model would compute, not a wait for an event
        out = self.get_submodule(self.name)(x if carry is None else carry)
        return nn.functional.mse_loss(out, y) if self.is_last else out.tanh()


def train_stages(job: str) -> None:
    """The same in two stages, with four micro-batches."""
    torch.set_num_threads(1)
    stages = [partial(Stage, "0", 512, 768, False), partial(Stage, "2", 768, 512, True)]
    data = [(torch.zeros(512), torch.ones(512)) for _ in range(64)]
    how = {"stages": stages, "microbatches": 4, "steps": _ENOUGH_STEPS}
    with psa.Worker(job, optimizer=psa.optim.AdamW(lr=1e-4), **how) as worker:  # type: ignore[arg-type]
        for batch in worker.batches(data, batch_size=12):
            before = worker.version
            worker.step(worker.compute(batch))
            if worker.is_main and worker.version != before:
                print(f"step {worker.version}", flush=True)


def train(job: str) -> None:
    """The script that the jobs run: 3.2 MB of parameters, about 20 ms a step, one line a step."""
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(512, 768), nn.Tanh(), nn.Linear(768, 512))
    data = [(torch.zeros(512), torch.ones(512)) for _ in range(64)]
    with psa.Worker(job, model, optimizer=psa.optim.AdamW(lr=1e-4), steps=_ENOUGH_STEPS) as worker:
        for x, y in worker.batches(data, batch_size=12):
            time.sleep(STEP_S)  # what a larger model would compute, not a wait for an event
            nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
            before = worker.version
            worker.step()
            if worker.is_main and worker.version != before:
                print(f"step {worker.version}", flush=True)


def pause_after(times_s: list[float], killed_s: float, gaps: int | None = None) -> float:
    """From the kill to the end of the longest gap between steps that follows it, of all or of so many first ones."""
    before = max((t for t in times_s if t <= killed_s), default=killed_s)
    marks = [before, *(t for t in times_s if t > killed_s)]
    pairs = list(itertools.pairwise(marks))[:gaps]
    _, end_s = max((later - earlier, later) for earlier, later in pairs)
    return end_s - killed_s


def measure(
    kind: str, rounds: int, rng: random.Random, servers: Servers, supervised: bool, stages: bool = False
) -> list[float]:
    """Pauses of ``rounds`` kills of one kind ("workers" or "servers"), in seconds."""
    job = f"recovery-{kind}-{'seen' if supervised else 'unseen'}-{rng.randrange(1 << 30)}"
    env = {"PSA_SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S)}
    pauses = []
    with ExitStack() as stack:
        journals = Path(stack.enter_context(TemporaryDirectory()))
        if stages:
            env["PSA_JOURNAL"] = str(journals)
        ranks = 1 if stages else 2 if supervised else 3  # the one that joins must get a rank
        script = "--train-stages" if stages else "--train"
        options = ["--workers", "2", "--servers", "2", "--ranks", str(ranks), "--max-restarts", str(2 * rounds)]
        run = stack.enter_context(servers.psa("run", *options, __file__, script, job, env=env))
        steps = stack.enter_context(closing(StepTimes(run)))
        steps.wait(WARM_UP_STEPS)
        store = stack.enter_context(closing(servers.store()))
        for _ in range(rounds):
            with ExitStack() as joined:
                if supervised:
                    victim = rng.choice(
                        [member.pid for member in getattr(describe(job, servers.settings, store), kind)]
                    )
                else:
                    command = ["worker", __file__, "--train", job] if kind == "workers" else ["server", "--job", job]
                    victim = joined.enter_context(servers.psa(*command, env=env)).pid
                    while not any(
                        member.pid == victim and (getattr(member, "ranks", ()) or getattr(member, "shards", 0))
                        for member in getattr(describe(job, servers.settings, store), kind)
                    ):
                        steps.wait(1)
                steps.wait(rng.randrange(20, 40))
                os.kill(victim, signal.SIGKILL)
                killed_s = time.monotonic()
                steps.wait(SETTLE_STEPS)
            whole_s = pause_after(steps.times_s, killed_s)
            # A worker that comes back gets its cells, which is another gap, and not the time to the next step.
            pauses.append(pause_after(steps.times_s, killed_s, IN_FLIGHT + 1) if stages else whole_s)
            print(f"  {kind}: {pauses[-1] * 1e3:.0f} ms, longest gap ends after {whole_s * 1e3:.0f} ms", flush=True)
        gaps = [later - earlier for earlier, later in itertools.pairwise(steps.times_s)]
        print(f"  normal step: {statistics.median(gaps) * 1e3:.1f} ms")
        if stages and kind == "workers":
            again = computed_again(journals)
            print(f"  computed again in {rounds} kills: {sum(again)} cells in {len(again)} steps, at most {max(again)}")
    return pauses


def computed_again(journals: Path) -> list[int]:
    """Of each step in which a cell was begun more than once, how often that was; [0] if there is none."""
    begun = Counter((each["term"], each["step"], each["stage"]) for each in read_history(journals).of("computing"))
    again: Counter[tuple[int, int]] = Counter()
    for (term, step, _), count in begun.items():
        again[term, step] += count - 1
    return [count for count in again.values() if count] or [0]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--unsupervised", action="store_true")
    options.add_argument("--stages", action="store_true", help="a model in two stages, supervised")
    options.add_argument("--train", metavar="JOB", help=argparse.SUPPRESS)
    options.add_argument("--train-stages", metavar="JOB", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.train:
        return train(args.train)
    if args.train_stages:
        return train_stages(args.train_stages)
    rng = random.Random(args.seed)
    with private_servers() as servers:
        rows = [
            (kind, measure(kind, args.rounds, rng, servers, not args.unsupervised, args.stages))
            for kind in ("workers", "servers")
        ]
    bound = f"{SESSION_TIMEOUT_S + 2:.0f} s, session timeout + 2 s" if args.unsupervised else "1 s"
    print(f"from SIGKILL to the next completed step, seed {args.seed} (aim: at most {bound})")
    for kind, pauses in rows:
        ordered = sorted(pauses)
        print(
            f"{kind:8} median {statistics.median(ordered):.3f} s   p95 {ordered[int(0.95 * (len(ordered) - 1))]:.3f} s"
            f"   max {ordered[-1]:.3f} s   ({len(ordered)} kills)"
        )
    return None


if __name__ == "__main__":
    main()
