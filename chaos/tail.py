"""Follows the journals of a run while they are written: which processes live, and how far the job is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the job that has written a journal."""

    role: str
    name: str
    pid: int

    handle: psutil.Process | None
    """Tells it from a later process with the same pid. None if it had ended before it was looked up."""

    @property
    def lives(self) -> bool:
        return self.handle is not None and alive(self.handle)


def alive(process: psutil.Process) -> bool:
    """Whether it is still the same process, and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Tail:
    """Reads what was appended since the last :meth:`look`. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._processes: dict[Path, Process] = {}
        self._elected: tuple[float, Path] | None = None
        """The newest election: when, and the journal of the elected server."""
        self.version = 0
        """The newest version that was acknowledged to a worker, in any term."""
        self.committed = 0
        """The newest version that a server has committed."""
        self.marked_corrupt = 0
        """Number of versions that servers have marked corrupt."""
        self.steps = 0
        """Number of acknowledged versions, recomputed ones included."""

    def look(self) -> None:
        """Read on."""
        for path in self._folder.glob("*-*.jsonl"):
            if not path.name.startswith(("worker-", "server-")):
                continue
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                self._note(path, line)

    def living(self, role: str) -> list[Process]:
        """Return the living processes of a role, the oldest first."""
        return [each for each in self._processes.values() if each.role == role and each.lives]

    def controller(self) -> Process | None:
        """Return the server that was elected last, if it lives."""
        if self._elected is None:
            return None
        last = self._processes[self._elected[1]]
        return last if last.lives else None

    def _note(self, path: Path, line: bytes) -> None:
        if b'"acked"' in line:
            self.steps += 1
            self.version = max(self.version, json.loads(line)["version"])
        elif b'"settled"' in line:
            self.steps += 1
            self.version = max(self.version, json.loads(line)["step"])
        elif b'"committed"' in line:
            self.committed = max(self.committed, json.loads(line)["version"])
        elif b'"marked_corrupt"' in line:
            self.marked_corrupt += 1
        elif b'"begin"' in line:
            begin = json.loads(line)
            try:
                handle = psutil.Process(begin["pid"])
            except psutil.NoSuchProcess:
                handle = None
            self._processes[path] = Process(begin["role"], begin["name"], begin["pid"], handle)
        elif b'"elected"' in line:
            # Not the last one read: two looks may be long apart, and journals are read one after the other.
            elected = (float(json.loads(line)["t"]), path)
            self._elected = max(self._elected or elected, elected)
