"""The private servers of a home as `psa run` needs them: run by this process, or by another one that came before.

Two runs may share a home. The one that came first starts the servers, the other one waits for that. When the first one
ends, its servers end with it; then the other one runs them, with the same data, at the same addresses: for its job
that is an outage like others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from psa_store import logs
from psa_store.config.private_servers import Addresses, hold_home, holder, publish, running
from psa_store.errors import DependencyUnreachable
from psa_store.launch.up import START_S, PrivateServers

_POLL_S = 0.05


class HomeServers:
    """Started and closed once. Use it in a thread that lives as long as the servers shall.

    ``restarts_max``: how often servers that are killed while they start may be started again.
    """

    def __init__(self, home: Path, restarts_max: int) -> None:
        self._home = home
        self._restarts = iter(range(restarts_max))
        self._servers: PrivateServers | None = None
        self._let_go: Callable[[], None] = lambda: None

    def start(self) -> Addresses:
        """Start the servers, or wait until the process that does so has done it; returns their addresses.

        Raises:
            DependencyUnreachable: they cannot be started, or another process takes too long.
        """
        begun_s, waits = time.monotonic(), logs.Waits()
        while True:
            found = running(self._home)
            if found is not None:
                waits.over("home")
                return found
            if self._hold():
                return self._run()
            waited_s = time.monotonic() - begun_s
            if waited_s > 2 * START_S:
                raise DependencyUnreachable(
                    f"process {holder(self._home)} has not started the private servers in {self._home} "
                    f"within {waited_s:.0f} s: end it, and try again"
                )
            waits.on("home", f"process {holder(self._home)} to start the private servers in {self._home}")
            time.sleep(_POLL_S)

    def mend(self) -> bool:
        """Start what has died, or the whole if the process that ran it has ended; False if nothing was wrong.

        Raises:
            DependencyUnreachable: it cannot be started.
        """
        if self._servers is None:
            if holder(self._home) is not None:
                return False
            logs.get_logger().warning("the process that ran the private servers has ended: they run from here now")
            self.start()
            return True
        if self._servers.running:
            return False
        logs.get_logger().warning("a private server died: starting it again")
        self._servers.start_again(self._may_restart)
        return True

    def close(self) -> None:
        """End the servers, if they are ours."""
        if self._servers is not None:
            self._servers.close()
        self._let_go()

    def _hold(self) -> bool:
        let_go = hold_home(self._home)
        if let_go is None:
            return False
        self._let_go = let_go
        return True

    def _may_restart(self) -> bool:
        return next(self._restarts, None) is not None

    def _run(self) -> Addresses:
        self._servers = PrivateServers(self._home)
        self._servers.start_again(self._may_restart)
        publish(self._home, self._servers.addresses)
        logs.get_logger().info("private Redis and ZooKeeper", home=str(self._home))
        return self._servers.addresses
