"""The background process of `psa up`: keeps the private servers running until SIGTERM."""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType

from psa_store import logs
from psa_store.config.private_servers import hold_home, publish
from psa_store.errors import DependencyUnreachable
from psa_store.launch.up import PrivateServers

_POLL_S = 0.1
_RESTARTS_MAX = 10
_RESTARTS_WINDOW_S = 60.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Stop(Exception):
    """SIGTERM came."""


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    for number in _SIGNALS:  # once is enough: a second one must not interrupt the stopping
        signal.signal(number, signal.SIG_IGN)
    raise _Stop


def main(home: Path, ensemble: int, *, tcp: bool) -> int:
    """Run the servers of ``home``; returns the exit code."""
    logs.configure("info", "up")
    logs.entitle(f"private servers of {home}")
    log = logs.get_logger()
    let_go = hold_home(home)
    if let_go is None:
        return 0  # another one was faster, and that is as good
    servers = PrivateServers(home, ensemble, tcp=tcp)
    restarts: deque[float] = deque(maxlen=_RESTARTS_MAX)

    def may_restart() -> bool:
        if len(restarts) == _RESTARTS_MAX and time.monotonic() - restarts[0] < _RESTARTS_WINDOW_S:
            return False
        restarts.append(time.monotonic())
        return True

    try:
        for number in _SIGNALS:
            signal.signal(number, _on_signal)
        servers.start_again(may_restart)
        publish(home, servers.addresses)
        while True:
            time.sleep(_POLL_S)
            if servers.running:
                continue
            if not may_restart():
                log.error("the private servers die again and again: giving up", home=str(home))
                return 3
            log.warning("a private server died: starting it again")
            try:
                servers.start()
            except DependencyUnreachable as error:
                log.warning("it died again while it started", error=str(error))
    except _Stop:
        return 0
    except DependencyUnreachable as error:
        log.error("cannot run the private servers", error=str(error))
        return error.exit_code
    finally:
        servers.close()
        let_go()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), tcp="--tcp" in sys.argv[3:]))
