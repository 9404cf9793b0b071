"""What the children of test_launch do."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from psa_store.cluster import ProcessRole
from psa_store.launch import Supervisor
from psa_store.wire import announce


def wait_for_sigterm(folder: str) -> None:
    """Announce ourselves, then sleep until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    announce(Path(os.environ["PSA_SUPERVISOR"]), {"event": "job", "job": folder, "member": os.environ["PSA_MEMBER"]})
    (Path(folder) / str(os.getpid())).touch()
    stop.wait()


def fail(code: int) -> None:
    sys.exit(code)


def supervise(folder: str) -> None:
    """A supervisor of two sleepers, in a process of its own, to be killed."""
    supervisor = Supervisor(preload=[], restarts_max=0, env={}, on_exit=lambda _: None, on_message=lambda _: None)
    for _ in range(2):
        supervisor.spawn(ProcessRole.WORKER, wait_for_sigterm, folder)
    supervisor.run(until=lambda: False)


if __name__ == "__main__":
    supervise(sys.argv[1])
