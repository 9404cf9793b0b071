"""What the benchmarks share: private servers, `psa` commands against them, and the times of a run's steps."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from psa_store.config import Settings
from psa_store.launch import PrivateServers, down, up
from psa_store.storage import RedisStore

ROOT = Path(__file__).resolve().parents[2]
PSA = (sys.executable, "-m", "psa_store.cli")
_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Servers:
    """A private Redis and a private ZooKeeper."""

    redis: str
    zookeeper: str
    home: Path
    """A temporary folder that ends with them."""

    @property
    def settings(self) -> Settings:
        return Settings(redis=self.redis, zookeeper=self.zookeeper)

    @property
    def env(self) -> dict[str, str]:
        """The environment of a command that uses them, and no other setting; its scripts can import this package."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PSA_")}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return inherited | {
            "PSA_REDIS": self.redis,
            "PSA_ZOOKEEPER": self.zookeeper,
            "PSA_HOME": str(self.home / "home"),
            "PSA_CONFIG": "",
            "PYTHONPATH": paths,
        }

    def store(self) -> RedisStore:
        return RedisStore(self.redis, timeout_s=30.0)

    @contextmanager
    def psa(self, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
        """Start a `psa` command whose output is piped, lines as the script prints them; SIGTERM it on leaving."""
        plain = ["--no-label"] if arguments[:1] == ("run",) else []
        with subprocess.Popen(
            [*PSA, *arguments[:1], *plain, *arguments[1:]],
            env=self.env | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.terminate()
                assert process.stdout is not None
                process.stdout.read()  # a full pipe would keep it from ending

    def psa_lines(self, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
        """Run a `psa` command to its end and yield the lines of its output; raise SystemExit if it fails."""
        with self.psa(*arguments, env=env) as process:
            assert process.stdout is not None
            yield from process.stdout
            if process.wait() != 0:
                raise SystemExit(f"psa {' '.join(arguments)} ended with exit code {process.returncode}")


@contextmanager
def private_servers() -> Iterator[Servers]:
    """Start a private Redis and ZooKeeper, with their data in a temporary folder; stop them on leaving."""
    with tempfile.TemporaryDirectory(prefix="psa-performance-") as home, closing(PrivateServers(Path(home))) as servers:
        servers.start()
        yield Servers(servers.addresses.redis, servers.addresses.zookeeper, Path(home))


@contextmanager
def keep_up() -> Iterator[Servers]:
    """As :func:`private_servers`, with a daemon that restarts a server that dies."""
    with tempfile.TemporaryDirectory(prefix="psa-performance-") as home:
        addresses = up(Path(home), 1)
        try:
            yield Servers(addresses.redis, addresses.zookeeper, Path(home))
        finally:
            down(Path(home))


class StepTimes:
    """Reads the lines ``step N [TIME]`` of a run in a thread; keeps the time of each, else that of reading it."""

    def __init__(self, run: subprocess.Popen[str]) -> None:
        self.times_s: list[float] = []
        self._run = run
        self._more = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, name="performance-reader")
        self._thread.start()

    def wait(self, count: int) -> None:
        """Wait for ``count`` more steps; raise SystemExit if the run ends or makes no step for too long."""
        with self._more:
            wanted = len(self.times_s) + count
            while len(self.times_s) < wanted:
                if self._ended or not self._more.wait(_PATIENCE_S):
                    raise SystemExit("the run ended, or makes no steps")

    def close(self) -> None:
        """End the run."""
        self._run.terminate()
        self._thread.join()

    def _read(self) -> None:
        assert self._run.stdout is not None
        for line in self._run.stdout:
            if line.startswith("step "):
                with self._more:
                    fields = line.split()
                    self.times_s.append(float(fields[2]) if len(fields) > 2 else time.monotonic())
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()


def summary(values: Sequence[float], form: str) -> str:
    """Format a median with the least and the greatest value."""
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return f"{middle:{form}} ({ordered[0]:{form}} to {ordered[-1]:{form}})"
