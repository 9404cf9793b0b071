"""The GPT example in several modes and compressions, one after the other: loss, time, and bytes that travel. ::

    python -m tests.performance.modes --data shakespeare.txt --link 0 --png modes.png
    python -m tests.performance.modes --slow-worker --workers 3 --steps 300 sync async ssp:staleness=2 sync:speculate
    python -m tests.performance.modes --link 20 sync@30 local:steps=20/int8@600

A variant is ``MODE`` or ``MODE/COMPRESSION``, and may end in ``@STEPS``; otherwise all see the same number of tokens.
``--slow-worker`` lets one worker run for a third of the time only (SIGSTOP and SIGCONT in turns). ``--link`` runs
everything in a network namespace of its own whose only link, the loopback, lets so many Mbit/s through, 0 for no
limit; nothing goes through shared memory then, and all bytes between processes are counted, except those to Redis. It
needs root, and ip, tc and unshare. The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from psa_store.examples import gpt
from psa_store.job.mode import parse_mode
from psa_store.observe.status import describe
from tests.performance.common import Servers, private_servers

_DEFAULT = (
    "sync",
    "ssp:staleness=2",
    "async",
    "local:steps=20",
    "local:steps=20/int8",
    "sync/int8",
    "async/topk:0.01",
)
_BURST, _QUEUE = "256kb", "500ms"
"""Of the token bucket: a loopback sends packets of up to 64 KiB."""
_STEP = re.compile(r"^step (\d+)/\d+ +loss (\S+)")
_LOSS = re.compile(r"^validation loss (\S+)")
_AWAKE_S, _ASLEEP_S = 0.1, 0.2
_JOIN_S = 30.0


@dataclass(slots=True)
class Result:
    """``curve``: seconds since the first line of output, steps of rank 0, training loss."""

    variant: str
    seconds: float = 0.0
    loss: float = float("nan")
    samples_per_version: float = 1.0
    tokens_per_sample: int = 1
    traffic: list[tuple[int, int]] = field(default_factory=list)
    """Bytes that have gone over the link when the server had a version."""
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    versions: list[tuple[float, int]] = field(default_factory=list)
    """The versions of the server while rank 0 trains; in modes on arrival, the updates of all ranks."""

    def samples_per_s(self) -> float:
        """Of all ranks, while rank 0 trains."""
        (begun, first), (ended, last) = self.versions[0], self.versions[-1]
        return self.samples_per_version * (last - first) / max(ended - begun, 1e-9)

    def bytes_per_sample(self) -> float:
        """Over the link; nan if it was not watched."""
        if not self.traffic:
            return float("nan")
        (begun, first), (ended, last) = self.traffic[0], self.traffic[-1]
        return (ended - begun) / max(self.samples_per_version * (last - first), 1e-9)


def train(variant: str, args: argparse.Namespace, servers: Servers) -> Result:
    """One run."""
    what, _, own_steps = variant.partition("@")
    text, _, compression = what.partition("/")
    mode, steps = parse_mode(text), own_steps or str(args.steps)
    result = Result(variant)
    result.samples_per_version = args.batch_size * mode.round_steps / (args.workers if mode.on_arrival else 1)
    result.tokens_per_sample = gpt.parse_options(["--job", "any"]).block
    job = re.sub(r"[^A-Za-z0-9]+", "-", variant)
    command = ["run", "--workers", str(args.workers), "--servers", "1"]
    command += ["--mode", str(mode), "--compress", compression or "none", str(Path(gpt.__file__))]
    command += ["--job", job, "--steps", steps, "--decay-steps", str(args.steps), "--sample", "0"]
    command += ["--batch-size", str(args.batch_size), *(["--data", str(args.data)] if args.data else [])]
    env = {} if args.link is None else {"PSA_CARRIER": "tcp"}
    with (
        closing(servers.store()) as store,
        _slowed(job, args.slow_worker, servers),
    ):
        begun = None
        for line in servers.psa_lines(*command, env=env):
            now = time.monotonic()
            if found := _STEP.match(line):
                begun = begun or now
                result.curve.append((now - begun, int(found[1]), float(found[2])))
                result.seconds = now - begun
                versions = [server.version for server in describe(job, servers.settings, store).servers]
                if versions and versions[0] is not None:
                    result.versions.append((now, versions[0]))
                    if args.link is not None:
                        result.traffic.append((_loopback_bytes(), versions[0]))
            if found := _LOSS.match(line):
                result.loss = float(found[1])
    print(
        f"{variant:32} validation loss {result.loss:.4f}  "
        f"{result.samples_per_s() * result.tokens_per_sample:9.0f} tokens/s  {result.samples_per_s():7.1f} samples/s  "
        f"{result.seconds:6.1f} s  {result.bytes_per_sample() * args.batch_size / 1e6:8.3f} MB a step",
        flush=True,
    )
    return result


def _go_inside(mbit: float) -> None:
    """Start this program again behind its own link; does not return."""
    limit = f"&& tc qdisc add dev lo root tbf rate {mbit}mbit burst {_BURST} latency {_QUEUE}" if mbit else ""
    script = f'ip link set lo up {limit} && exec "$@"'
    here = [sys.executable, "-m", "tests.performance.modes", "--inside", *sys.argv[1:]]
    os.execvp("unshare", ["unshare", "--net", "sh", "-c", script, "sh", *here])


def _loopback_bytes() -> int:
    """Return the bytes that the loopback of this network namespace has received."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[0] == "lo:")


@contextmanager
def _slowed(job: str, wanted: bool, servers: Servers) -> Iterator[None]:
    """Let one worker, not the one that prints, run for a third of the time until the end."""
    ended = threading.Event()

    def alternate() -> None:
        pid = _last_worker(job, servers, ended)
        while pid is not None and not ended.is_set():
            try:
                os.kill(pid, signal.SIGSTOP)
                ended.wait(_ASLEEP_S)
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                return
            ended.wait(_AWAKE_S)

    thread = threading.Thread(target=alternate, name="bench-slow-worker")
    if wanted:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if wanted:
            thread.join(_JOIN_S)


def _last_worker(job: str, servers: Servers, ended: threading.Event) -> int | None:
    """A worker that does not hold rank 0, which prints, once all ranks are held."""
    with closing(servers.store()) as store:
        while not ended.wait(0.2):
            if store.read_job(job) is None:
                continue
            found = describe(job, servers.settings, store)
            holders = [worker for worker in found.workers if worker.ranks]
            if sum(len(worker.ranks) for worker in holders) == found.ranks and len(holders) > 1:
                return next(worker.pid for worker in holders if 0 not in worker.ranks)
    return None


def draw(results: Sequence[Result], path: Path) -> None:
    """Loss against wall time, one line a variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    for result in results:
        times, _, losses = zip(*result.curve, strict=True)
        axes.plot(times, losses, label=f"{result.variant}: {result.loss:.3f}")
    axes.set_xlabel("seconds since the first steps were shown")
    axes.set_ylabel("training loss of rank 0")
    axes.legend(title="validation loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("variants", nargs="*", default=list(_DEFAULT), metavar="VARIANT")
    options.add_argument("--data", type=Path)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--batch-size", type=int, default=12)
    options.add_argument("--slow-worker", action="store_true")
    options.add_argument("--link", type=float, metavar="MBIT", help="count bytes, and let so many Mbit/s through")
    options.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--png", type=Path)
    args = options.parse_args()
    if args.link is not None and not args.inside:
        _go_inside(args.link)
    with private_servers() as servers:
        results = [train(variant, args, servers) for variant in args.variants]
    first = results[0]
    for result in results[1:]:
        print(
            f"{result.variant:32} against {first.variant}: loss {result.loss - first.loss:+.4f}, "
            f"{result.samples_per_s() / first.samples_per_s():.2f} times the samples/s, "
            f"1/{first.bytes_per_sample() / result.bytes_per_sample():.1f} of the bytes"
        )
    if args.png:
        draw(results, args.png)


if __name__ == "__main__":
    main()
