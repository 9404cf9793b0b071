"""By how much a checkpoint delays steps: ``python -m tests.performance.checkpoint_delay``.

Trains a stack of linear layers whose parameters and AdamW state are ``--megabytes``, times every step in the main
worker, and takes checkpoints meanwhile, one every few steps. There are no regular commits
(``commit_every=0``), so nothing else is written. Steps that overlap a checkpoint, from its request to its end, are
compared with the others of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from contextlib import closing
from itertools import pairwise

import torch
from torch import nn

import psa_store as psa
from psa_store.checkpoint.catalog import read_job, remove
from psa_store.checkpoint.take import take
from psa_store.coordination import Coordination
from tests.performance.common import Servers, StepTimes, private_servers

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
    script = [__file__, "--train", f"--megabytes={args.megabytes}", f"--samples={args.samples}"]
    with (
        private_servers() as servers,
        servers.psa("run", f"--workers={args.workers}", "--commit-every=0", *script) as run,
        closing(StepTimes(run)) as steps,
    ):
        spans = _take(servers, steps, args.checkpoints)
        ended_s = list(steps.times_s)
    _report(args.megabytes, args.workers, ended_s, spans)
    return None


def _take(servers: Servers, steps: StepTimes, count: int) -> list[tuple[float, float]]:
    """Take checkpoints; return when each was requested and when it was complete."""
    woken = threading.Event()
    spans = []
    steps.wait(_WARM_UP_STEPS)
    coordination = Coordination(servers.zookeeper, JOB, session_timeout_s=4.0, connect_timeout_s=5.0, wake=woken.set)
    with closing(servers.store()) as store, closing(coordination):
        coordination.start()
        for number in range(count):
            steps.wait(_BETWEEN_STEPS)
            begun_s = time.monotonic()
            done = take(store, coordination, woken, JOB, f"c{number}", 300.0)
            spans.append((begun_s, time.monotonic()))
            steps.wait(1)
            remove(store, JOB, read_job(store, JOB).layout, [done.name])
        steps.wait(_BETWEEN_STEPS)
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
