"""Checkpoints are written to files beside training, by a thread of the controller's process."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

from psa_store import telemetry
from psa_store.checkpoint.archive import Archive
from psa_store.errors import PsaError
from psa_store.storage import RedisStore

_NICENESS = 10
"""Training comes first: on Linux each thread has a priority of its own."""


class Exporter:
    """Owns the thread ``psa-export``. Any thread may :meth:`submit`.

    Args:
        keep, older_than_s: how many automatic exports stay, and for how long.
        tell: is told in one sentence what came of each, in the thread of this.
    """

    def __init__(
        self, store: RedisStore, archive: Archive, keep: int, older_than_s: float | None, tell: Callable[[str], None]
    ) -> None:
        self._store = store
        self._archive = archive
        self._keep = keep
        self._older_than_s = older_than_s
        self._tell = tell
        self._log = telemetry.get_logger()
        self._wanted: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="psa-export")
        self._thread.start()

    def submit(self, name: str) -> None:
        """Write this checkpoint, unless it is written."""
        self._wanted.put(name)

    def close(self) -> None:
        """Finish what was submitted."""
        self._wanted.put(None)
        self._thread.join()

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (name := self._wanted.get()) is not None:
            try:
                export = self._archive.write(self._store, name)
                self._archive.prune(self._keep, self._older_than_s)
            except PsaError as error:
                self._log.error("a checkpoint was not written to files", checkpoint=name, why=str(error))
                self._tell(f"checkpoint {name} was not written to files: {error}")
            else:
                self._log.info("checkpoint in files", checkpoint=name, version=export.version, folder=export.url)
                self._tell(f"checkpoint {name} is in files: {export.url}")
