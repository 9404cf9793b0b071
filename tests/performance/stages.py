"""What stages cost, and what they save. ::

    python -m tests.performance.stages relay        8 MB from one worker to the next, beside gloo
    python -m tests.performance.stages throughput   two stages beside two data-parallel workers
    python -m tests.performance.stages memory       peak memory of a worker with 1, 2 and 4 stages
    python -m tests.performance.stages trend        memory of all, and what the relay keeps between steps, over 1,000

Each prints its figure beside a reference that was measured in the same run, in rounds that interleave the two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import sys
import time
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import psa_store as psa
from psa_store.examples import gpt
from psa_store.observe.status import describe
from psa_store.storage import RedisStore
from tests.performance.common import Servers, private_servers, summary

CARRY_BYTES = 8 << 20
MICROBATCHES = 8
WARM_UP_STEPS = 5
TREND_BYTES = 256 << 10
TREND_LOOKS = 10
MEMORY_BLOCKS = 8
MEMORY_WIDTH = 2048
"""A block has 16 MB of parameters."""


class Carrier(nn.Module):
    """Hands on so many bytes, and computes next to nothing."""

    def __init__(self, name: str, size_bytes: int, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.register_parameter(name, nn.Parameter(torch.zeros(1)))
        self.name = name
        self.carried = [torch.zeros(size_bytes // 4)]  # no buffer: it is not to travel with the parameters

    def forward(self, carry: Tensor | None, microbatch: Tensor) -> Tensor:
        parameter = self.get_parameter(self.name)
        if not self.is_last:
            return self.carried[0]
        assert carry is not None
        return parameter.sum() + carry.sum() + microbatch.sum()  # all of it is read


class Block(nn.Module):
    """One of the blocks of the model whose memory is measured."""

    def __init__(self, low: int, high: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): nn.Linear(width, width, bias=False) for i in range(low, high)})
        self.is_last = high == MEMORY_BLOCKS

    def forward(self, carry: Tensor | None, microbatch: Tensor) -> Tensor:
        x = microbatch if carry is None else carry
        for block in self.blocks.values():
            x = block(x).tanh()
        return x.square().mean() if self.is_last else x


# --- the relay


def train_carry(job: str, size_bytes: int, steps: int, place: Path) -> None:
    """Two stages; the last one writes down the seconds of each step."""
    torch.set_num_threads(1)
    stages = [partial(Carrier, "first", size_bytes, False), partial(Carrier, "last", size_bytes, True)]
    times_s: list[float] = []
    optimizer = psa.optim.SGD(lr=0.0)
    how = {"stages": stages, "microbatches": MICROBATCHES, "steps": steps}
    with psa.Worker(job, optimizer=optimizer, **how) as worker:  # type: ignore[arg-type]
        for batch in worker.batches(torch.zeros(64, 1), batch_size=MICROBATCHES):
            begun_s = time.perf_counter()
            worker.step(worker.compute(batch))
            times_s.append(time.perf_counter() - begun_s)
        if worker.is_main:
            place.write_text(json.dumps(times_s[WARM_UP_STEPS:]))


def gloo_peer(rank: int, place: str, size_bytes: int, count: int) -> None:
    """Send so many bytes from rank 0 to rank 1, which answers with a few; rank 0 writes down the median of seconds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}.rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    data, answer = torch.zeros(size_bytes // 4), torch.zeros(1)
    times_s = []
    for _ in range(count):
        begun_s = time.perf_counter()
        if rank == 0:
            dist.send(data, 1)
            dist.recv(answer, 1)
        else:
            dist.recv(data, 0)
            data.sum()
            dist.send(answer, 0)
        times_s.append(time.perf_counter() - begun_s)
    if rank == 0:
        Path(place).write_text(json.dumps(statistics.median(times_s[WARM_UP_STEPS:])))
    dist.destroy_process_group()


def relay(rounds: int) -> None:
    """Compare the time that 8 MB add to a micro-batch with what they add to a gloo send that is answered."""
    ours, theirs = [], []
    with private_servers() as servers:
        for index in range(rounds):
            steps = 40
            per_step = {}
            for size_bytes in (CARRY_BYTES, 4096):
                place = servers.home / f"carry-{index}-{size_bytes}.json"
                job = f"carry-{index}-{size_bytes}"
                script = [__file__, "train-carry", job, str(size_bytes), str(steps), str(place)]
                run(servers, ["--workers", "2", "--servers", "1", "--ranks", "1"], script)
                per_step[size_bytes] = statistics.median(json.loads(place.read_text()))
            ours.append((per_step[CARRY_BYTES] - per_step[4096]) / MICROBATCHES * 1e3)
            by_size = {}
            for size_bytes in (CARRY_BYTES, 4096):
                place = servers.home / f"gloo-{index}-{size_bytes}"
                mp.spawn(gloo_peer, (str(place), size_bytes, 60), nprocs=2)  # type: ignore[no-untyped-call]
                by_size[size_bytes] = json.loads(place.read_text())
            theirs.append((by_size[CARRY_BYTES] - by_size[4096]) * 1e3)
            print(f"round {index + 1}: relay {ours[-1]:.2f} ms, gloo {theirs[-1]:.2f} ms for 8 MB", flush=True)
    print(f"relay {summary(ours, '.2f')} ms, gloo {summary(theirs, '.2f')} ms")
    print(f"relay / gloo {summary([a / b for a, b in zip(ours, theirs, strict=True)], '.2f')} (aim: at most 1.3)")


# --- what grows


def train_trend(job: str, steps: int, folder: Path) -> None:
    """Two stages; all workers stand still, now and then, until a file says that they were looked at."""
    torch.set_num_threads(1)
    stages = [partial(Carrier, "first", TREND_BYTES, False), partial(Carrier, "last", TREND_BYTES, True)]
    how = {"stages": stages, "microbatches": MICROBATCHES, "steps": steps}
    with psa.Worker(job, optimizer=psa.optim.SGD(lr=0.0), **how) as worker:  # type: ignore[arg-type]
        for batch in worker.batches(torch.zeros(64, 1), batch_size=MICROBATCHES):
            if worker.version and worker.version % (steps // TREND_LOOKS) == 0:
                if worker.is_main:
                    os.write(1, f"at {worker.version}\n".encode())
                while not (folder / f"seen-{worker.version}").exists():
                    time.sleep(0.01)  # a script can only poll files
            worker.step(worker.compute(batch))


def kept(pid: int) -> list[int]:
    """The sizes of what the relay of a server keeps: memory of carries whose descriptors it has."""
    folder, sizes = Path(f"/proc/{pid}/fd"), []
    for each in folder.iterdir():
        try:
            if "memfd:psa-carry" in str(each.readlink()):
                sizes.append(each.stat().st_size)
        except FileNotFoundError:
            pass  # closed meanwhile
    return sizes


def trend(steps: int) -> None:
    """Print memory, and what the relay keeps, at some versions, when all workers stand still there."""
    with private_servers() as servers, closing(RedisStore(servers.redis, timeout_s=10.0)) as store:
        script = [__file__, "train-trend", "trend", str(steps), str(servers.home)]
        grown: dict[str, list[float]] = {}
        for line in servers.psa_lines("run", "--workers", "2", "--servers", "1", "--ranks", "1", *script):
            if not (found := re.search(r"\bat (\d+)$", line)):
                continue
            status = describe("trend", servers.settings, store)
            members = [("server", each.pid) for each in status.servers] + [
                ("worker", each.pid) for each in status.workers
            ]
            rss_mb = [(role, psutil.Process(pid).memory_info().rss / (1 << 20)) for role, pid in members]
            parcels = [size for each in status.servers for size in kept(each.pid)]
            for index, (role, mb) in enumerate(rss_mb):
                grown.setdefault(f"{role} {index}", []).append(mb)
            print(
                f"version {found[1]:>6}: {', '.join(f'{role} {mb:.1f} MB' for role, mb in rss_mb)}; "
                f"relay {len(parcels)} parcels, {sum(parcels)} bytes",
                flush=True,
            )
            (servers.home / f"seen-{found[1]}").touch()
        for name, each in grown.items():
            print(f"{name}: {each[-1] - each[0]:+.1f} MB from the first look to the last")


# --- throughput


def throughput(rounds: int, steps: int) -> None:
    """Compare two workers of one stage each with two data-parallel workers, with the same batch."""
    batch = ["--batch-size", "32", "--width", "192", "--block", "64", "--eval-batches", "0", "--sample", "0"]
    shapes = {
        "data parallel": (["--ranks", "2"], []),
        "two stages": (["--ranks", "1"], ["--stages", "2", "--microbatches", str(MICROBATCHES)]),
    }
    found: dict[str, list[float]] = {name: [] for name in shapes}
    with private_servers() as servers:
        for index in range(rounds):
            for name, (how, more) in list(shapes.items())[:: -1 if index % 2 else 1]:
                place = servers.home / f"{index}-{name.replace(' ', '-')}.json"
                script = [
                    gpt.__file__,
                    "--job",
                    place.stem,
                    "--steps",
                    str(steps),
                    "--timing",
                    str(place),
                    *batch,
                    *more,
                ]
                run(servers, ["--workers", "2", "--servers", "1", *how], script)
                timing = json.loads(place.read_text())
                found[name].append(timing["seconds"] / timing["steps"] * 1e3)
                print(f"round {index + 1}: {name:<14} {found[name][-1]:.1f} ms per step", flush=True)
    for name, times_ms in found.items():
        print(f"{name:<14} {summary(times_ms, '.1f')} ms per step")
    ratios = [a / b for a, b in zip(found["data parallel"], found["two stages"], strict=True)]
    print(f"throughput of two stages / data parallel: {summary(ratios, '.2f')} (aim: at least 0.9)")
    print(f"what the schedule alone leaves: {MICROBATCHES / (MICROBATCHES + 1):.2f}")


# --- memory


def train_memory(
    job: str, stages: int, width: int, place: Path, limit_mb: int | None = None, resident: int | None = None
) -> None:
    """Train a model of blocks this wide, and write down the peak memory of this process in MB.

    ``limit_mb``: how much private memory the process may have from here on, beside what torch has taken already.
    ``resident``: how many stages it has in memory at once; None: one, and a worker for each.
    """
    torch.set_num_threads(1)
    if limit_mb is not None:
        limit = memory_now("VmData") + (limit_mb << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    size = MEMORY_BLOCKS // stages
    parts = [partial(Block, low, low + size, width) for low in range(0, MEMORY_BLOCKS, size)]
    optimizer = psa.optim.AdamW(lr=1e-4)
    how = {"microbatches": 2, "resident_stages": resident, "optimizer": optimizer, "steps": 2}
    with psa.Worker(job, stages=parts, **how) as worker:  # type: ignore[arg-type]
        while resident is None and worker.members < stages:
            time.sleep(0.02)  # until each has one stage: a worker that comes first would have those of all
        for batch in worker.batches(torch.ones(64, width), batch_size=8):
            worker.step(worker.compute(batch))
    with place.open("a") as lines:
        lines.write(f"{memory_now('VmHWM') / (1 << 20)}\n")


def memory_now(what: str) -> int:
    """Bytes of this process, by a name in proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{what}:"))


def memory() -> None:
    """Say the peak memory of the workers, each of which has one stage, above that with a model of next to nothing."""
    with private_servers() as servers:

        def peaks(stages: int, width: int) -> list[float]:
            job = f"memory-{stages}-{width}"
            script = [__file__, "train-memory", job, str(stages), str(width), str(servers.home / job)]
            run(servers, ["--workers", str(stages), "--servers", "1", "--ranks", "1"], script)
            return sorted(map(float, (servers.home / job).read_text().split()))

        model = MEMORY_BLOCKS * MEMORY_WIDTH**2 * 4 / (1 << 20)
        for stages in (1, 2, 4):
            empty, full = peaks(stages, 8)[-1], peaks(stages, MEMORY_WIDTH)
            part = model / stages
            above = [peak - empty for peak in full]
            print(
                f"{stages} stages of {part:.0f} MB: a worker takes {above[0]:.0f} to {above[-1]:.0f} MB, "
                f"{above[0] / part:.1f} to {above[-1] / part:.1f} of its parameters, above {empty:.0f} MB for torch",
                flush=True,
            )


def run(servers: Servers, options: list[str], script: list[str]) -> None:
    """Run a job to its end."""
    for _ in servers.psa_lines("run", *options, *script):
        pass


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=["relay", "throughput", "memory", "trend"])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, help="default: 100, of a trend 1000")
    args = options.parse_args()
    if args.what == "relay":
        relay(args.rounds)
    elif args.what == "throughput":
        throughput(args.rounds, args.steps or 100)
    elif args.what == "trend":
        trend(args.steps or 1000)
    else:
        memory()


if __name__ == "__main__":
    if sys.argv[1:2] == ["train-carry"]:
        train_carry(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    elif sys.argv[1:2] == ["train-trend"]:
        train_trend(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    elif sys.argv[1:2] == ["train-memory"]:
        more = [int(each) for each in sys.argv[6:]]
        train_memory(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]), *more)
    else:
        main()
