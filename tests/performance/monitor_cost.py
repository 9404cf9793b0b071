"""What monitoring costs: ``python -m tests.performance.monitor_cost --rounds 10``.

Runs the same job with and without its monitors (PSA_MONITOR), in turns, and compares steps per second, and the CPU time
that all its processes together take per step, which a busy machine changes less. Two workers and one server train a
model so small that a step takes a few milliseconds: there, what is done per step, and what wakes up beside it every
second, weighs most. Ratios are taken within a round, and every second round has the opposite order. The first steps,
in which processes start, do not count. Beside other programs both figures vary by more than the cost; then the third
one tells: the CPU time of the monitor's thread itself in the main worker, as a share of the wall time. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import threading
import time
from pathlib import Path

import torch
from torch import nn

import psa_store as psa
from tests.performance.common import Servers, private_servers

WARM_UP_STEPS = 300
AIM = 0.01
RUN_TIMEOUT_S = 300.0
_WIDTH = 128


def train(job: str, steps: int) -> None:
    """The script of the job; the main worker prints the three figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 1))
    data = [(torch.randn(32), torch.randn(1)) for _ in range(256)]
    begun_s = begun_cpu_s = begun_own_s = 0.0
    with psa.Worker(job, model, optimizer=psa.optim.AdamW(lr=1e-4, clip_grad_norm=1.0), steps=steps) as worker:
        for x, y in worker.batches(data, batch_size=16):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            worker.step(loss)
            if worker.version == WARM_UP_STEPS:
                begun_s, begun_cpu_s, begun_own_s = time.perf_counter(), siblings_cpu_s(), monitor_cpu_s()
            if worker.version == steps and worker.is_main:
                timed, took_s = steps - WARM_UP_STEPS, time.perf_counter() - begun_s
                cpu_s, own_s = siblings_cpu_s() - begun_cpu_s, monitor_cpu_s() - begun_own_s
                print(f"took {timed / took_s} {1e3 * cpu_s / timed} {own_s / took_s}", flush=True)


def monitor_cpu_s() -> float:
    """CPU time of the monitor's thread of this process; 0 without one."""
    ids = [each.native_id for each in threading.enumerate() if each.name == "psa-monitor"]
    return sum(int(Path(f"/proc/self/task/{each}/schedstat").read_text().split()[0]) for each in ids) / 1e9


def siblings_cpu_s() -> float:
    """CPU time of all children of our parent: under `psa run`, the workers and servers of the job."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # The name of the program comes before, in parentheses, and may contain anything.
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getppid():
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(job: str, steps: int, monitor: bool, servers: Servers) -> tuple[float, float, float]:
    """Run once; return steps per second, CPU milliseconds per step, and the share of the monitor's thread."""
    env = {"PSA_MONITOR": str(int(monitor)), "PSA_LOG_LEVEL": "error"}
    script = [__file__, "--train", job, "--steps", str(steps)]
    lines = [line.split() for line in servers.psa_lines("run", "--workers=2", "--servers=1", *script, env=env)]
    (found,) = [line[1:] for line in lines if line[:1] == ["took"]]
    speed, cpu_ms, share = map(float, found)
    return speed, cpu_ms, share


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--steps", type=int, default=10_000)
    options.add_argument("--train", default="", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.steps <= WARM_UP_STEPS or args.rounds < 1:
        options.error(f"use more than {WARM_UP_STEPS} steps and at least one round")
    if args.train:
        return train(args.train, args.steps)
    found: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    with private_servers() as servers:
        for index in range(args.rounds):
            for monitor in (True, False) if index % 2 else (False, True):
                job = f"cost-{index}-{'with' if monitor else 'without'}"
                found[monitor].append(measure(job, args.steps, monitor, servers))
                print(
                    "{:16} {:8.1f} steps/s  {:8.3f} ms of CPU a step".format(job, *found[monitor][-1][:2]), flush=True
                )
    pairs = list(zip(found[True], found[False], strict=True))
    report("steps/s", [(on[0], off[0], 1 - on[0] / off[0]) for on, off in pairs])
    report("ms of CPU a step", [(on[1], off[1], on[1] / off[1] - 1) for on, off in pairs])
    print(f"the monitor's thread itself: {statistics.median(part for _, _, part in found[True]):.2%} of a core")
    print(f"aim: at most {AIM:.1%}")
    return None


def report(unit: str, rounds: list[tuple[float, float, float]]) -> None:
    """Print the medians of (with, without, cost), and the spread of the cost."""
    on, off, cost = (statistics.median(values) for values in zip(*rounds, strict=True))
    quartiles = statistics.quantiles([each for _, _, each in rounds], n=4) if len(rounds) > 1 else [cost] * 3
    print(
        f"{unit}: with monitors {on:.3f}, without {off:.3f}; they cost {cost:+.2%} "
        f"(median of {len(rounds)} rounds, quartiles {quartiles[0]:+.2%} to {quartiles[2]:+.2%})"
    )


if __name__ == "__main__":
    main()
