"""`psa up` and `psa down`: the private servers as a background process that outlives the command.

How other processes find them: see :mod:`psa_store.config.private_servers`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from psa_store import logs
from psa_store.config.own_files import private_opener
from psa_store.config.private_servers import Addresses, holder, make_home, running
from psa_store.errors import DependencyUnreachable
from psa_store.launch.child import KilledWhileStarting
from psa_store.launch.redis_server import PrivateRedis
from psa_store.launch.zookeeper_server import PrivateZooKeeper

START_S = 60.0
_STOP_S = 30.0
_POLL_S = 0.05
_LOG_LINES = 12


class PrivateServers:
    """The pair of private servers of one home folder. ``tcp``: Redis is reached by TCP instead of its socket."""

    def __init__(self, home: Path, ensemble: int = 1, *, tcp: bool = False) -> None:
        self._tcp = tcp
        self._redis = PrivateRedis(home / "redis", tcp=tcp)
        self._zookeeper = PrivateZooKeeper(home / f"zookeeper-{ensemble}", ensemble)

    @property
    def addresses(self) -> Addresses:
        return Addresses(self._redis.tcp_url if self._tcp else self._redis.url, self._zookeeper.hosts)

    @property
    def running(self) -> bool:
        return self._redis.running and self._zookeeper.running

    def start(self) -> None:
        """Start what does not run; raises DependencyUnreachable if something is missing or does not answer."""
        self._redis.start(START_S)
        self._zookeeper.start(START_S)

    def start_again(self, may_restart: Callable[[], bool]) -> None:
        """The same; one that is killed while it starts is started again as long as ``may_restart`` says so."""
        while True:
            try:
                return self.start()
            except KilledWhileStarting as error:
                if not may_restart():
                    raise
                logs.get_logger().warning("a private server was killed while it started: again", error=str(error))

    def close(self) -> None:
        self._zookeeper.stop()
        self._redis.stop()


def up(home: Path, ensemble: int, *, tcp: bool = False) -> Addresses:
    """Start the private servers in the background, unless they run; returns their addresses.

    Raises:
        UsageError: the home belongs to another user, or is open to others.
        DependencyUnreachable: they do not start; the message holds the end of the log.
    """
    make_home(home)
    found = running(home)
    if found is not None:
        return found
    log_path = home / "up.log"
    with open(log_path, "ab", opener=private_opener) as log:
        daemon = subprocess.Popen(
            # -P: a file in the current directory is no module of ours.
            [sys.executable, "-P", "-m", "psa_store.launch.daemon", str(home), str(ensemble), *["--tcp"] * tcp],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end_s, waits = time.monotonic() + START_S, logs.Waits()
    # Another `psa up` may have been faster: then our daemon ends at once, and we wait for the other one's.
    while time.monotonic() < end_s and (daemon.poll() is None or holder(home) is not None):
        found = running(home)
        if found is not None:
            waits.over("up")
            return found
        waits.on("up", f"the private servers in {home} to start")
        time.sleep(_POLL_S)
    lines = log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    raise DependencyUnreachable(f"the private servers in {home} do not start:\n" + "\n".join(lines))


def down(home: Path) -> bool:
    """Stop the private servers and wait for their end; False if none were running."""
    pid = holder(home)
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    end_s, waits = time.monotonic() + _STOP_S, logs.Waits()
    while holder(home) is not None:
        if time.monotonic() > end_s:
            raise DependencyUnreachable(f"the private servers in {home} (pid {pid}) do not stop; see {home}/up.log")
        waits.on("down", f"process {pid} to stop the private servers in {home}")
        time.sleep(_POLL_S)
    return True
