"""Checkpoints are written to files beside training, by a thread of the controller's process.

Files may be slower than checkpoints come. Then some are left out: what waits is replaced by what is newer, since Redis
would have dropped it before its turn came.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from psa_store import logs
from psa_store.checkpoint.files.archive import Archive
from psa_store.errors import PsaError
from psa_store.storage import RedisStore

_NICENESS = 10
"""Training comes first: on Linux each thread has a priority of its own."""


class Exporter:
    """Owns the thread ``psa-export``. Any thread may :meth:`submit`.

    Args:
        keep, older_than_s: how many automatic exports stay, and for how long.
        report: takes one sentence of what came of each, in the thread of this.
    """

    def __init__(
        self, store: RedisStore, archive: Archive, keep: int, older_than_s: float | None, report: Callable[[str], None]
    ) -> None:
        self._store = store
        self._archive = archive
        self._keep = keep
        self._older_than_s = older_than_s
        self._report = report
        self._log = logs.get_logger()
        self._changed = threading.Condition()
        self._wanted: str | None = None
        self._closing = False
        # It may hang in a file system for as long as that likes, and must not keep the process.
        self._thread = threading.Thread(target=self._run, name="psa-export", daemon=True)
        self._thread.start()

    def submit(self, name: str) -> None:
        """Write this checkpoint, unless it is written or a newer one is submitted before its turn comes."""
        with self._changed:
            left_out, self._wanted = self._wanted, name
            self._changed.notify()
        if left_out not in (None, name):
            self._log.warning("files are slower than checkpoints: one is left out", checkpoint=left_out)

    def close(self, timeout_s: float = 30.0) -> None:
        """Finish what was submitted, as far as that is possible in this time; the rest ends with the process."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._log.warning("a checkpoint is not in files yet, and is given up", waited_s=timeout_s)

    def _next(self) -> str | None:
        """Wait for what is wanted; None: nothing more will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted is not None or self._closing)
            name, self._wanted = self._wanted, None
            return name

    def _run(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (name := self._next()) is not None:
            self._write(name)
            try:
                self._archive.prune(self._keep, self._older_than_s)
            except PsaError as error:
                self._log.error("old checkpoints were not removed from files", why=str(error))

    def _write(self, name: str) -> None:
        try:
            export = self._archive.write(self._store, name)
        except PsaError as error:
            self._log.error("a checkpoint was not written to files", checkpoint=name, why=str(error))
            self._report(f"checkpoint {name} was not written to files: {error}")
        except Exception as error:  # a fault of ours must not end the thread in silence
            self._log.error("a checkpoint was not written to files", checkpoint=name, exc_info=error)
            self._report(f"checkpoint {name} was not written to files: {error!r}")
        else:
            self._log.info("checkpoint in files", checkpoint=name, version=export.version, folder=export.url)
            self._report(f"checkpoint {name} is in files: {export.url}")
