"""An export to files against a plain write: ``python -m tests.performance.export [--megabytes 1000] [--rounds 5]``.

Starts a private Redis with a job of AdamW state (parameters and two slots) and exports it to safetensors, in turns
with the plainest program that makes as many bytes durable there: one file, written from memory in blocks of
4 MiB, and fsync. Medians of both, and of the ratio of neighbours.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

import psa_store as psa
from psa_store.checkpoint.files.export import export_version
from psa_store.checkpoint.reader import StoredVersion, open_version
from psa_store.job.config import JobConfig
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.launch import PrivateRedis
from psa_store.storage import Manifest, RedisStore, ShardState

JOB = "bench"
SECTIONS = ("param", "exp_avg", "exp_avg_sq")
AIM = 0.6
_BLOCK_BYTES = 4 << 20
_WIDTH = 1024
_TIMEOUT_S = 60.0


def commit_state(store: RedisStore, megabytes: int) -> StoredVersion:
    """Commit one version of matrices of 1024 x 1024 and vectors, with two slots each."""
    matrices = max(1, round(megabytes * 1e6 / len(SECTIONS) / (4 * _WIDTH * _WIDTH)))
    specs = [
        spec
        for number in range(matrices)
        for spec in (
            TensorSpec((f"layers.{number}.weight",), (_WIDTH, _WIDTH), "float32", TensorRole.TRAINED),
            TensorSpec((f"layers.{number}.bias",), (_WIDTH - 1,), "float32", TensorRole.TRAINED),
        )
    ]
    layout = make_layout(specs)
    config = JobConfig(JOB, 2, 0, psa.optim.AdamW(lr=1e-3).to_dict(), layout.fingerprint)
    every = range(len(layout.shards))
    store.seal(JOB, every, 1, layout.fingerprint)
    draw = np.random.default_rng(0)
    for shard in layout.shards:
        arrays = {name: ("float32", memoryview(draw.bytes(shard.size_bytes))) for name in SECTIONS}
        (outcome,) = store.commit_each(JOB, 1, 1, [ShardState(shard.index, arrays, {"opt_step": 1}, None)], keep=1)
        assert isinstance(outcome[1], Manifest), outcome
    store.create_job(JOB, config.to_json(), layout.to_json())
    return open_version(store, JOB)


def write_plainly(path: Path, size_bytes: int, block: bytes) -> None:
    """As many bytes into one file, durable at the end."""
    with open(path, "xb", buffering=0) as file:
        for low in range(0, size_bytes, len(block)):
            file.write(block[: size_bytes - low])
        os.fsync(file.fileno())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=int, default=1000, help="size of the state, 10^6 bytes each")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--folder", type=Path, help="where to write [default: a temporary folder]")
    options.add_argument("--tcp", action="store_true", help="read over TCP instead of the Unix socket")
    args = options.parse_args()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
        server = PrivateRedis(home / "redis", {"appendonly": "no"}, tcp=args.tcp)
        stack.callback(server.stop)
        server.start(10)
        url = server.tcp_url if args.tcp else server.url
        store = stack.enter_context(closing(RedisStore(url, timeout_s=_TIMEOUT_S)))
        store.check()
        version = commit_state(store, args.megabytes)
        block = np.random.default_rng(1).bytes(_BLOCK_BYTES)
        rates: dict[str, list[float]] = {"plain write": [], "export": []}
        size_bytes = 0
        for number in range(args.rounds + 1):
            started_s = time.perf_counter()
            export = export_version(version, str(home / "export"))
            took_s = time.perf_counter() - started_s
            size_bytes = sum(file.size_bytes for file in export.files)
            shutil.rmtree(home / "export")
            started_s = time.perf_counter()
            write_plainly(home / "plain", size_bytes, block)
            plain_s = time.perf_counter() - started_s
            (home / "plain").unlink()
            if number:  # the first warms up
                rates["export"].append(size_bytes / 1e9 / took_s)
                rates["plain write"].append(size_bytes / 1e9 / plain_s)
    ratios = [a / b for a, b in zip(rates["export"], rates["plain write"], strict=True)]
    print(f"{size_bytes / 1e6:.0f} MB of AdamW state in {len(version.layout.shards)} shards, {args.rounds} rounds")
    for name, its in rates.items():
        print(f"{name:12} {statistics.median(its):5.2f} GB/s   ({min(its):.2f} to {max(its):.2f})")
    spread = f"({min(ratios):.2f} to {max(ratios):.2f}; aim: at least {AIM})"
    print(f"{'ratio':12} {statistics.median(ratios):5.2f}        {spread}")


if __name__ == "__main__":
    main()
