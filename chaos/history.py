"""The history of a run: the events in the journals of its processes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psa_store.errors import DataIntegrity
from psa_store.job.mode import SYNC, Mode, parse_mode


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


class History:
    """All events of a run, in the order of time."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = sorted(events, key=lambda event: event.t)
        self._of: dict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            self._of[event.event].append(event)

    def of(self, name: str) -> list[Event]:
        """Return the events of one name."""
        return self._of.get(name, [])

    @property
    def scenario(self) -> Mapping[str, Any]:
        """What the harness was to do."""
        return self.of("scenario")[0].fields


@dataclass(frozen=True, slots=True)
class Reference:
    """What a run without faults comes to; every other run must come to the same."""

    digests: Mapping[tuple[int, int | None], str]
    """By version, and by stage or None for the whole model, the digest of what user code gets."""
    final: str
    """sha256 of all parameters and optimizer state after the last step."""


def read_history(folder: Path) -> History:
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
                raise DataIntegrity(f"{path}:{number}: no line of a history: {error}") from error
    return History(events)


def reference_of(history: History, final: str, mode: Mode = SYNC) -> Reference:
    """Return what an undisturbed run comes to. What ranks see between rounds is no version."""
    shown = [] if mode.in_rounds else history.of("batch")
    return Reference({whole_or_stage(event): event["digest"] for event in shown}, final)


def mode_of(history: History) -> Mode:
    """How the job took gradients."""
    return parse_mode(history.scenario["mode"]) if history.of("scenario") else SYNC


def whole_or_stage(event: Event) -> tuple[int, int | None]:
    """Which version was seen, and which stage of it; None: the whole model."""
    return event["version"], event.fields.get("stage")
