"""What steps feel of a checkpoint: ``python -m tests.performance.checkpoint_delay``.

Trains a stack of linear layers whose parameters and AdamW state are ``--megabytes``, times every step in the process
that owns output, and takes checkpoints meanwhile, one every few steps. There are no regular commits
(``commit_every=0``), so nothing else is written. Steps that overlap a checkpoint, from its request to its end, are
compared with the others of the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import psa_store as psa
from psa_store.checkpoint.catalog import read_job, remove
from psa_store.checkpoint.saving import save
from psa_store.config import Settings
from psa_store.coordination import Coordination
from psa_store.launch import PrivateServers
from psa_store.storage import RedisStore

JOB = "delay"
AIM_SHARE, AIM_S = 0.10, 0.050
_WARM_UP_STEPS = 4
_BETWEEN_STEPS = 6
_STATE_PER_PARAMETER = 12
"""Bytes: the parameter and AdamW's two means, float32."""


def train(megabytes: float, samples: int, steps: int) -> None:
    """The training script: prints when each step ended."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    width = 2048
    layers = max(1, round(megabytes * 1e6 / _STATE_PER_PARAMETER / (width * width)))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    data = [torch.randn(width) for _ in range(64)]
    with psa.Worker(JOB, model, optimizer=psa.optim.AdamW(lr=1e-4), steps=steps) as worker:
        for batch in worker.batches(data, batch_size=samples * worker.ranks):
            model(batch).square().mean().backward()
            worker.step()
            if worker.is_main:
                print(f"step {worker.version} {time.monotonic()}", flush=True)


class _Steps:
    """When each step ended, as the run prints it."""

    def __init__(self, run: subprocess.Popen[str]) -> None:
        self.ended_s: list[float] = []
        self._run = run
        self._more = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._run.stdout is not None
        for line in self._run.stdout:
            if line.startswith("step "):
                with self._more:
                    self.ended_s.append(float(line.split()[2]))
                    self._more.notify_all()
        with self._more:
            self._over = True
            self._more.notify_all()

    def wait_for(self, count: int) -> None:
        with self._more:
            self._more.wait_for(lambda: self._over or len(self.ended_s) >= count)
            if len(self.ended_s) < count:
                raise SystemExit("the run ended before its time")

    def close(self) -> None:
        self._run.terminate()
        self._thread.join()
        self._run.wait()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=float, default=1000.0, help="parameters and optimizer state, 10^6 bytes")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--samples", type=int, default=48, help="per rank and step; decides how long a step takes")
    options.add_argument("--checkpoints", type=int, default=5)
    options.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.train:
        return train(args.megabytes, args.samples, 1 << 30)
    with tempfile.TemporaryDirectory() as home, closing(PrivateServers(Path(home))) as servers:
        servers.start()
        addresses = servers.addresses
        settings = Settings(redis=addresses.redis, zookeeper=addresses.zookeeper)
        script = [
            str(Path(__file__).resolve()),
            "--train",
            f"--megabytes={args.megabytes}",
            f"--samples={args.samples}",
        ]
        command = [sys.executable, "-m", "psa_store.cli", "run", f"--workers={args.workers}", "--commit-every=0"]
        env = {**os.environ, "PSA_REDIS": addresses.redis, "PSA_ZOOKEEPER": addresses.zookeeper, "PSA_CONFIG": ""}
        run = subprocess.Popen([*command, *script], env=env, stdout=subprocess.PIPE, text=True)
        with closing(_Steps(run)) as steps:
            spans = _take(settings, steps, args.checkpoints)
            ended_s = list(steps.ended_s)
    _report(args.megabytes, args.workers, ended_s, spans)
    return None


def _take(settings: Settings, steps: _Steps, count: int) -> list[tuple[float, float]]:
    """Take checkpoints; returns when each was asked for and when it was there."""
    assert settings.redis is not None and settings.zookeeper is not None
    woken = threading.Event()
    spans = []
    steps.wait_for(_WARM_UP_STEPS)
    coordination = Coordination(settings.zookeeper, JOB, session_timeout_s=4.0, connect_timeout_s=5.0, wake=woken.set)
    with closing(RedisStore(settings.redis, timeout_s=5.0)) as store, closing(coordination):
        coordination.start()
        for number in range(count):
            steps.wait_for(len(steps.ended_s) + _BETWEEN_STEPS)
            begun_s = time.monotonic()
            done = save(store, coordination, woken, JOB, f"c{number}", 300.0)
            spans.append((begun_s, time.monotonic()))
            steps.wait_for(len(steps.ended_s) + 1)
            remove(store, JOB, read_job(store, JOB).layout, [done.name])
        steps.wait_for(len(steps.ended_s) + _BETWEEN_STEPS)
    return spans


def _report(megabytes: float, workers: int, ended_s: list[float], spans: list[tuple[float, float]]) -> None:
    during: list[float] = []
    normal: list[float] = []
    for begun_s, end_s in list(pairwise(ended_s))[_WARM_UP_STEPS:]:
        overlaps = any(begun_s < there_s and end_s > asked_s for asked_s, there_s in spans)
        (during if overlaps else normal).append(end_s - begun_s)
    usual_s = statistics.median(normal)
    allowed_s = max(AIM_SHARE * usual_s, AIM_S)
    worst_s = max(during) - usual_s
    took = statistics.median(there_s - asked_s for asked_s, there_s in spans)
    print(
        f"{megabytes:.0f} MB of state, {workers} workers: normal step {usual_s * 1e3:.0f} ms (median of {len(normal)}, "
        f"slowest {max(normal) * 1e3:.0f} ms); {len(spans)} checkpoints, {took:.1f} s each from request to end\n"
        f"beside a checkpoint: median {statistics.median(during) * 1e3:.0f} ms of {len(during)}, "
        f"slowest {max(during) * 1e3:.0f} ms: delayed by at most {worst_s * 1e3:.0f} ms = {worst_s / usual_s:.1%} "
        f"(aim: {allowed_s * 1e3:.0f} ms); the slowest normal step by {(max(normal) - usual_s) * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
