"""Commits and loads against raw streams: ``python -m tests.performance.storage [--megabytes 300] [--rounds 7]``.

Starts a private Redis and commits consecutive versions of one state as a server's committer does (parameters and two
slots of AdamW per shard, three versions kept, so that old ones are freed), then loads each as a server does when it
takes over. The reference, interleaved in the same run, moves the same bytes in values of 4 MiB over one plain socket:
SET into new keys with an expiry, each after the removal of a key of three rounds before, and GET into memory.

By default Redis keeps everything in memory only. ``--append-only`` starts it as ``psa up`` does, with a log on disk:
then every commit is also bound by how fast this machine writes files.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from psa_store.launch import PrivateRedis
from psa_store.storage import CHUNK_BYTES, Manifest, RedisStore, ShardState
from psa_store.storage.caller import Caller

JOB = "bench"
TERM = 1
KEEP = 3
LOADERS = 4
"""As many threads as a server loads with."""
SECTIONS = ("param", "exp_avg", "exp_avg_sq")
WARM_UP_ROUNDS = KEEP + 1
"""Until Redis holds as many versions as it ever will."""
TARGETS_GB_S = {"commit": 1.3, "load": 1.5}
_TIMEOUT_S = 30.0
_ASKED_MAX = 2


class RawStream:
    """SET and GET of the state's bytes over the plain socket of one connection."""

    def __init__(self, url: str, data: memoryview) -> None:
        self._caller = Caller(url, _TIMEOUT_S, 1)
        connection = self._caller.pool.get_connection()  # type: ignore[no-untyped-call]
        self._sock = connection._sock
        self._answers = self._sock.makefile("rb")
        self._parts = [data[low : low + CHUNK_BYTES] for low in range(0, len(data), CHUNK_BYTES)]
        self._place = memoryview(bytearray(len(data)))

    def close(self) -> None:
        self._answers.close()
        self._caller.close()

    def write(self, version: int) -> None:
        for index, part in enumerate(self._parts):
            self._sock.sendall(
                _command("UNLINK", f"raw:{version - KEEP}:{index}")
                + f"*6\r\n$3\r\nSET\r\n{_word(f'raw:{version}:{index}')}${len(part)}\r\n".encode()
            )
            self._sock.sendall(part)
            self._sock.sendall(f"\r\n{_word('EX')}{_word('3600')}{_word('NX')}".encode())
            if index:
                self._expect_written()
        self._expect_written()

    def _expect_written(self) -> None:
        answers = self._answers.readline() + self._answers.readline()
        assert answers in (b":0\r\n+OK\r\n", b":1\r\n+OK\r\n"), answers

    def read(self, version: int) -> None:
        low = 0
        for index, part in enumerate(self._parts):
            ahead = range(len(self._parts))[index + _ASKED_MAX - 1 : index + _ASKED_MAX] if index else range(_ASKED_MAX)
            for asked in ahead:
                self._sock.sendall(_command("GET", f"raw:{version}:{asked}"))
            assert self._answers.readline() == f"${len(part)}\r\n".encode()
            high = low + len(part)
            while low < high:
                low += self._answers.readinto(self._place[low:high])
            self._answers.read(2)


class State:
    """A job's state as its server commits and loads it."""

    def __init__(self, store: RedisStore, data: memoryview, shards: int) -> None:
        self._store = store
        self._shards = shards
        self._data = data
        self._place = memoryview(bytearray(len(data)))
        self._manifests: dict[int, Manifest] = {}
        store.seal(JOB, range(shards), TERM, "layout")

    def commit(self, version: int) -> None:
        expect = version - 1 if version > 1 else None
        states = [
            ShardState(
                shard,
                {name: ("float32", part) for name, part in self._sections(self._data, shard).items()},
                {"opt_step": version},
                expect,
            )
            for shard in range(self._shards)
        ]
        with closing(self._store.commit_each(JOB, TERM, version, states, keep=KEEP)) as outcomes:
            for shard, outcome in outcomes:
                assert isinstance(outcome, Manifest), outcome
                self._manifests[shard] = outcome

    def load(self, version: int) -> None:
        def load(shard: int) -> None:
            self._store.load(JOB, shard, self._manifests[shard], self._sections(self._place, shard))

        with ThreadPoolExecutor(LOADERS) as loaders:
            list(loaders.map(load, range(self._shards)))
        assert self._manifests[0].version == version

    def _sections(self, whole: memoryview, shard: int) -> dict[str, memoryview]:
        size = len(whole) // self._shards // len(SECTIONS)
        low = shard * size * len(SECTIONS)
        return {name: whole[low + size * i : low + size * (i + 1)] for i, name in enumerate(SECTIONS)}

    def check(self) -> None:
        """What was loaded is what was committed."""
        assert self._place == self._data


def _word(text: str) -> str:
    return f"${len(text)}\r\n{text}\r\n"


def _command(*words: str) -> bytes:
    return f"*{len(words)}\r\n{''.join(map(_word, words))}".encode()


def measure(url: str, megabytes: int, shard_megabytes: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of each kind of transfer, by round."""
    shards = max(1, megabytes // (shard_megabytes * len(SECTIONS)))
    size_bytes = shards * len(SECTIONS) * shard_megabytes << 20
    data = memoryview(np.random.default_rng(0).bytes(size_bytes))
    rates: dict[str, list[float]] = {"raw SET": [], "commit": [], "raw GET": [], "load": []}
    with closing(RedisStore(url, timeout_s=_TIMEOUT_S)) as store, closing(RawStream(url, data)) as raw:
        store.check()
        state = State(store, data, shards)
        turns: dict[str, Callable[[int], None]] = {
            "raw SET": raw.write,
            "commit": state.commit,
            "raw GET": raw.read,
            "load": state.load,
        }
        for version in range(1, WARM_UP_ROUNDS + rounds + 1):
            for name, turn in turns.items():
                started_s = time.perf_counter()
                turn(version)
                if version > WARM_UP_ROUNDS:
                    rates[name].append(size_bytes / 1e9 / (time.perf_counter() - started_s))
        state.check()
    print(f"{size_bytes / 1e6:.0f} MB in {shards} shards of {len(SECTIONS)} x {shard_megabytes} MiB, {rounds} rounds")
    return rates


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=int, default=300, help="MiB of state")
    options.add_argument("--shard-megabytes", type=int, default=2, help="MiB of a shard's parameters")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--append-only", action="store_true")
    options.add_argument("--tcp", action="store_true", help="over TCP instead of the Unix socket")
    args = options.parse_args()
    persistence = {"appendonly": "yes" if args.append_only else "no"}
    with tempfile.TemporaryDirectory() as home, ExitStack() as stack:
        server = PrivateRedis(Path(home), persistence, tcp=args.tcp)
        stack.callback(server.stop)
        server.start(10)
        url = server.tcp_url if args.tcp else server.url
        rates = measure(url, args.megabytes, args.shard_megabytes, args.rounds)
    print(f"{'':8}  median  quartiles     GB/s; log on disk: {persistence['appendonly']}; {url.split(':')[0]} socket")
    for name, reference in {"raw SET": "", "commit": "raw SET", "raw GET": "", "load": "raw GET"}.items():
        low, middle, high = statistics.quantiles(rates[name], n=4)
        line = f"{name:8}  {middle:5.2f}   {low:.2f} to {high:.2f}"
        if reference:
            ratio = statistics.median(a / b for a, b in zip(rates[name], rates[reference], strict=True))
            line += f"   {ratio:.2f} of {reference}   (aim: at least {TARGETS_GB_S[name]})"
        print(line)


if __name__ == "__main__":
    main()
