"""Processes of a DataLoader end with the worker whose batches they make, also if that is killed.

By themselves they ask whether their parent lives. Where they are forked by a server of multiprocessing, that is their
parent, and it lives as long as they do: they would stay for ever, and keep the worker's output open.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable


class EndsWithWorker:
    """The ``worker_init_fn`` of a DataLoader of this process: ``then`` is the script's own."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self._worker = os.getpid()
        self._then = then

    def __call__(self, number: int) -> None:
        threading.Thread(target=self._wait, name="psa-ends-with-worker", daemon=True).start()
        if self._then is not None:
            self._then(number)

    def _wait(self) -> None:
        try:
            worker = os.pidfd_open(self._worker)
        except ProcessLookupError:
            os._exit(1)
        except OSError:  # no such call in this kernel: as without this class
            return
        select.select([worker], [], [])
        os._exit(1)
