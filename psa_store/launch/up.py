"""`psa up` and `psa down`: the private servers as a background process that outlives the command.

The process holds a lock on its pid file as long as it lives; the kernel drops the lock however it dies.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from psa_store.config import Settings
from psa_store.errors import DependencyUnreachable, UsageError
from psa_store.job.document import from_text, to_text
from psa_store.launch.redis_server import PrivateRedis
from psa_store.launch.zookeeper_server import PrivateZooKeeper

START_S = 60.0
_STOP_S = 30.0
_POLL_S = 0.05
_GLANCE_S = 0.1
_LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the private servers answer: a document in their home folder."""

    FORMAT: ClassVar[int] = 1

    redis: str
    zookeeper: str


class PrivateServers:
    """The pair of private servers of one home folder."""

    def __init__(self, home: Path, ensemble: int = 1) -> None:
        self._redis = PrivateRedis(home / "redis")
        self._zookeeper = PrivateZooKeeper(home / f"zookeeper-{ensemble}", ensemble)

    @property
    def addresses(self) -> Addresses:
        return Addresses(self._redis.url, self._zookeeper.hosts)

    @property
    def running(self) -> bool:
        return self._redis.running and self._zookeeper.running

    def start(self) -> None:
        """Start what does not run; raises DependencyUnreachable if something is missing or does not answer."""
        self._redis.start(START_S)
        self._zookeeper.start(START_S)

    def close(self) -> None:
        self._zookeeper.stop()
        self._redis.stop()


def up(home: Path, ensemble: int) -> Addresses:
    """Start the private servers in the background, unless they run; returns their addresses.

    Raises:
        DependencyUnreachable: they do not start; the message holds the end of the log.
    """
    home.mkdir(parents=True, exist_ok=True)
    found = running(home)
    if found is not None:
        return found
    log_path = home / "up.log"
    with log_path.open("ab") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "psa_store.launch.daemon", str(home), str(ensemble)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end_s = time.monotonic() + START_S
    # Another `psa up` may have been faster: then our daemon ends at once, and we wait for the other one's.
    while time.monotonic() < end_s and (daemon.poll() is None or _holder(home) is not None):
        found = running(home)
        if found is not None:
            return found
        time.sleep(_POLL_S)
    lines = log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    raise DependencyUnreachable(f"the private servers in {home} do not start:\n" + "\n".join(lines))


def running(home: Path) -> Addresses | None:
    """The addresses of the private servers, if they run and answer.

    Raises:
        DataIntegrity: another release runs them, and wrote the addresses in a format that this one does not know.
    """
    path = _addresses_path(home)
    if _holder(home) is None or not path.exists():
        return None
    return from_text(Addresses, path.read_text(), f"{path}, of the private servers that run,")


def fill_addresses(settings: Settings) -> Settings:
    """Settings with both addresses: their own, else those of the private servers that run; raises UsageError if these
    are not known."""
    if settings.redis is not None and settings.zookeeper is not None:
        return settings
    found = running(settings.home)
    if found is None:
        raise UsageError(
            f"no private servers run in {settings.home}: `psa up` starts them, "
            "or set PSA_REDIS and PSA_ZOOKEEPER to your own"
        )
    return with_addresses(settings, found)


def with_addresses(settings: Settings, found: Addresses) -> Settings:
    """The same settings, with these addresses where they say none."""
    redis, zookeeper = settings.redis or found.redis, settings.zookeeper or found.zookeeper
    return settings.model_copy(update={"redis": redis, "zookeeper": zookeeper})


def down(home: Path) -> bool:
    """Stop the private servers and wait for their end; False if none were running."""
    pid = _holder(home)
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    end_s = time.monotonic() + _STOP_S
    while _holder(home) is not None:
        if time.monotonic() > end_s:
            raise DependencyUnreachable(f"the private servers in {home} (pid {pid}) do not stop; see {home}/up.log")
        time.sleep(_POLL_S)
    return True


def hold_home(home: Path) -> Callable[[], None] | None:
    """Become the one process that runs private servers in ``home``; None if another is. Call the result to let go."""
    home.mkdir(parents=True, exist_ok=True)
    file = os.open(home / "up.pid", os.O_RDWR | os.O_CREAT, 0o600)
    if not _lock(file):
        os.close(file)
        return None
    _addresses_path(home).unlink(missing_ok=True)
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    return lambda: os.close(file)


def _lock(file: int) -> bool:
    # A process that looks for a holder takes the lock for an instant: only one that keeps it is a holder.
    end_s = time.monotonic() + _GLANCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end_s:
                return False
            time.sleep(_POLL_S / 10)


def publish(home: Path, addresses: Addresses) -> None:
    """Let :func:`running` find the servers; whole or not at all."""
    path = _addresses_path(home)
    draft = path.with_suffix(".draft")
    draft.write_text(to_text(addresses))
    draft.replace(path)


def _addresses_path(home: Path) -> Path:
    return home / "servers.json"


def _holder(home: Path) -> int | None:
    """The process that holds the lock of ``home``, if one does."""
    path = home / "up.pid"
    if not path.exists():
        return None
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        text = os.pread(file, 32, 0)
        return int(text) if text else None  # it has the lock, but has not written yet
    finally:
        os.close(file)
