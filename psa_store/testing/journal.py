"""What a process did, written down where its death cannot take it away: the evidence of the chaos harness.

Off unless PSA_JOURNAL names a folder. One file per process, one JSON object per line, each written by one system
call, so that after SIGKILL everything that was done before can be read, and at most the last line is torn.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from psa_store.errors import UsageError


class Journal:
    """Thread-safe. Without a folder it records nothing, at the cost of one comparison."""

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
        """Whether anybody will read it: ask before computing what only the journal needs."""
        return self._file is not None

    def record(self, event: str, **fields: object) -> None:
        """Write down that something happened now. ``t`` is comparable between the processes of one machine."""
        if self._file is not None:
            line = json.dumps({"t": time.monotonic(), "event": event, **fields}, separators=(",", ":"))
            os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        """Idempotent; what is recorded later is dropped."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


def fingerprint_text(total: int) -> str:
    """A sum of 64-bit digests as the journal writes it: additive, so that parts of a gradient can be added up."""
    return f"{total & 0xFFFF_FFFF_FFFF_FFFF:016x}"
