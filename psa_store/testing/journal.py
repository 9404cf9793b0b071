"""A record of what a process did that survives its death: the evidence that the chaos harness checks.

Off unless PSA_JOURNAL names a folder. One file per process, one JSON object per line, each written by one system call:
after SIGKILL everything that was done before can be read, and at most the last line is torn.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from psa_store.errors import UsageError


class Journal:
    """The journal of one process. Thread-safe. Without a folder it records nothing, at the cost of one comparison."""

    def __init__(self, folder: Path | None, role: str, name: str) -> None:
        self._file: int | None = None
        if folder is None:
            return
        path = folder / f"{role}-{name}.jsonl"
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(f"PSA_JOURNAL={str(folder)!r}: cannot write {path}: {error.strerror}") from error
        self.record("begin", role=role, name=name, pid=os.getpid())

    @property
    def enabled(self) -> bool:
        """Whether anything is recorded: ask before computing what only the journal needs."""
        return self._file is not None

    def record(self, event: str, **fields: object) -> None:
        """Record an event that happened now. ``t`` is comparable between the processes of one machine."""
        if self._file is not None:
            line = json.dumps({"t": time.monotonic(), "event": event, **fields}, separators=(",", ":"))
            os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        """Close the file. Idempotent; later events are dropped."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def fingerprint_text(total: int) -> str:
    """Format a sum of 64-bit digests. It is additive, so that the parts of a gradient can be summed."""
    return f"{total & 0xFFFF_FFFF_FFFF_FFFF:016x}"
