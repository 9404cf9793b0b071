"""Peak memory of a server: ``python -m tests.performance.memory --megabytes 100``.

Trains a model of that many bytes of float32 parameters with AdamW, two ranks, one server, a commit every few steps,
and prints the server's highest resident memory beside the bytes of the parameters and optimizer state that it owns.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

import psa_store as psa
from psa_store.observe.status import describe
from tests.performance.common import private_servers

STEPS = 12
COMMIT_EVERY = 3
FACTOR = 3
ALLOWANCE_BYTES = 300_000_000
JOB = "memory"


class Flat(nn.Module):
    """Parameters without computation: the gradient is the parameter itself."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(1 << 20) for _ in range(count))

    def forward(self) -> torch.Tensor:
        total = torch.zeros(())
        for weight in self.weights:
            total = total + weight.square().sum()
        return total


def train(megabytes: int) -> None:
    torch.set_num_threads(1)
    model = Flat(megabytes * 10**6 // (4 << 20))
    with psa.Worker(JOB, model, optimizer=psa.optim.AdamW(lr=1e-3, clip_grad_norm=1.0), steps=STEPS) as worker:
        for _ in worker.batches(torch.zeros(8), batch_size=2):
            model().backward()
            worker.step()
            if worker.is_main:
                print(f"step {worker.version}", flush=True)


def peak_bytes(pid: int) -> int:
    """Return the highest resident memory of a process (Linux: VmHWM, in kB)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=int, default=100)
    options.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.train:
        return train(args.megabytes)
    flags = ["--workers=2", "--servers=1", "--ranks=2", f"--commit-every={COMMIT_EVERY}"]
    peak = layout_bytes = pid = 0
    with private_servers() as servers, closing(servers.store()) as store:
        for line in servers.psa_lines("run", *flags, __file__, "--train", f"--megabytes={args.megabytes}"):
            if line.startswith("step "):
                if not pid:
                    described = describe(JOB, servers.settings, store)
                    pid, layout_bytes = described.servers[0].pid, described.bytes or 0
                peak = max(peak, peak_bytes(pid))
    state = 3 * layout_bytes  # parameters and AdamW's two moments
    bound = FACTOR * state + ALLOWANCE_BYTES
    print(
        f"server peak {peak / 1e6:.0f} MB for {state / 1e6:.0f} MB of parameters and state "
        f"(aim: at most {FACTOR} x state + 300 MB = {bound / 1e6:.0f} MB)"
    )
    return None


if __name__ == "__main__":
    main()
