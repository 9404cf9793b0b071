"""How long training stands still when a process is killed: ``python -m tests.performance.recovery --rounds 20``.

Starts jobs with `psa run`, kills a worker or a server with SIGKILL at random moments, and takes the time from the kill
to the next completed step, as a reader of the job's output sees it. With ``--unsupervised`` the victim was started by
`psa worker` or `psa server` alone, so that nobody but its ZooKeeper session tells of its death. The reference printed
beside it is the normal time of a step in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import IO

import torch
from torch import nn

import psa_store as psa
from psa_store.config import Settings
from psa_store.launch import PrivateServers
from psa_store.observe.status import describe
from psa_store.storage import RedisStore

SESSION_TIMEOUT_S = 4.0
STEP_S = 0.02
WARM_UP_STEPS = 30
SETTLE_STEPS = 60
"""Steps between two kills: the restarted process is back by then."""
_ENOUGH_STEPS = 1_000_000
_PATIENCE_S = 60.0


def train(job: str) -> None:
    """The script that the jobs run: 3.2 MB of parameters, about 20 ms a step, one line a step."""
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(512, 768), nn.Tanh(), nn.Linear(768, 512))
    data = [(torch.zeros(512), torch.ones(512)) for _ in range(64)]
    with psa.Worker(job, model, optimizer=psa.optim.AdamW(lr=1e-4), steps=_ENOUGH_STEPS) as worker:
        for x, y in worker.batches(data, batch_size=12):
            time.sleep(STEP_S)
            nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
            before = worker.version
            worker.step()
            if worker.is_main and worker.version != before:
                print(f"step {worker.version}", flush=True)


class Steps:
    """Reads the output of a process in a thread and keeps the time at which each step was reported."""

    def __init__(self, stream: IO[str]) -> None:
        self.times_s: list[float] = []
        self._stream = stream
        self._thread = Thread(target=self._read, name="bench-reader")
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:
            if line.startswith("step "):
                self.times_s.append(time.monotonic())

    def wait(self, count: int) -> None:
        """Wait for ``count`` more steps."""
        wanted = len(self.times_s) + count
        end_s = time.monotonic() + _PATIENCE_S
        while len(self.times_s) < wanted:
            if time.monotonic() > end_s:
                raise SystemExit("the job does not go on")
            time.sleep(0.005)

    def join(self) -> None:
        self._thread.join()


@contextmanager
def process(arguments: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A `psa` command, ended with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "psa_store.cli", *arguments],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()


def pause_after(times_s: list[float], killed_s: float) -> float:
    """From the kill to the end of the longest gap between steps that follows it."""
    before = max((t for t in times_s if t <= killed_s), default=killed_s)
    marks = [before, *(t for t in times_s if t > killed_s)]
    _, end_s = max((later - earlier, later) for earlier, later in itertools.pairwise(marks))
    return end_s - killed_s


def measure(kind: str, rounds: int, rng: random.Random, env: dict[str, str], supervised: bool) -> list[float]:
    """Pauses of ``rounds`` kills of one kind ("workers" or "servers"), in seconds."""
    job = f"recovery-{kind}-{'seen' if supervised else 'unseen'}-{rng.randrange(1 << 30)}"
    settings = Settings(redis=env["PSA_REDIS"], zookeeper=env["PSA_ZOOKEEPER"])
    script = str(Path(__file__).resolve())
    pauses = []
    with ExitStack() as stack:
        ranks = 2 if supervised else 3  # a guest must have something to do
        options = ["--workers", "2", "--servers", "2", "--ranks", str(ranks), "--max-restarts", str(2 * rounds)]
        run = stack.enter_context(process(["run", *options, script, "--train", job], env))
        assert run.stdout is not None
        steps = Steps(run.stdout)
        stack.callback(steps.join)
        steps.wait(WARM_UP_STEPS)
        store = stack.enter_context(closing(RedisStore(settings.redis or "", timeout_s=5)))
        for _ in range(rounds):
            with ExitStack() as guest:
                if supervised:
                    victim = rng.choice([member.pid for member in getattr(describe(job, settings, store), kind)])
                else:
                    command = ["worker", script, "--train", job] if kind == "workers" else ["server", "--job", job]
                    victim = guest.enter_context(process(command, env)).pid
                    while not any(
                        member.pid == victim and (getattr(member, "ranks", ()) or getattr(member, "shards", 0))
                        for member in getattr(describe(job, settings, store), kind)
                    ):
                        steps.wait(1)
                steps.wait(rng.randrange(20, 40))
                os.kill(victim, signal.SIGKILL)
                killed_s = time.monotonic()
                steps.wait(SETTLE_STEPS)
            pauses.append(pause_after(steps.times_s, killed_s))
            print(f"  {kind}: {pauses[-1] * 1e3:.0f} ms", flush=True)
        gaps = [later - earlier for earlier, later in itertools.pairwise(steps.times_s)]
        print(f"  normal step: {statistics.median(gaps) * 1e3:.1f} ms")
        run.send_signal(signal.SIGTERM)
        run.wait(60)
    return pauses


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--unsupervised", action="store_true")
    options.add_argument("--train", metavar="JOB", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.train:
        return train(args.train)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as home, closing(PrivateServers(Path(home))) as servers:
        servers.start()
        env = {
            "PSA_REDIS": servers.addresses.redis,
            "PSA_ZOOKEEPER": servers.addresses.zookeeper,
            "PSA_SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S),
        }
        rows = [(kind, measure(kind, args.rounds, rng, env, not args.unsupervised)) for kind in ("workers", "servers")]
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
