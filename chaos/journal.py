"""Reads what the processes of a run wrote down. What the events mean stands in the table of ``chaos/README.md``."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psa_store.errors import DataIntegrity


@dataclass(frozen=True, slots=True)
class Event:
    """One line. ``name`` is the process that wrote it: a member of the job, or "0" of the harness and the reader."""

    t: float
    event: str
    role: str
    name: str
    pid: int
    fields: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]


class Journal:
    """All events of a run, in the order of time."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = sorted(events, key=lambda event: event.t)
        self._of: dict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            self._of[event.event].append(event)

    def of(self, name: str) -> list[Event]:
        """The events of one name."""
        return self._of.get(name, [])

    @property
    def scenario(self) -> Mapping[str, Any]:
        """What the harness was asked to do."""
        return self.of("scenario")[0].fields


@dataclass(frozen=True, slots=True)
class Truth:
    """What a run comes to that nobody disturbs."""

    digests: Mapping[int, str]
    """What user code sees of the model at each version."""
    final: str
    """sha256 of all parameters and optimizer state after the last step."""


def read(folder: Path) -> Journal:
    """Read all journals of a run. The last line of a process that was killed may be torn, and is left out.

    Raises:
        DataIntegrity: another line cannot be read; names it.
    """
    events: list[Event] = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        role = name = ""
        pid = 0
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break is torn, or empty
            try:
                fields = json.loads(line)
                if fields["event"] == "begin":
                    role, name, pid = fields["role"], fields["name"], fields["pid"]
                events.append(Event(fields["t"], fields["event"], role, name, pid, fields))
            except (ValueError, KeyError) as error:
                raise DataIntegrity(f"{path}:{number}: no line of a journal: {error}") from error
    return Journal(events)


def truth(journal: Journal, final: str) -> Truth:
    """What an undisturbed run saw."""
    return Truth({event["version"]: event["digest"] for event in journal.of("batch")}, final)
