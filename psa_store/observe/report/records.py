"""Points and events as the report reads them: what is no number is absent, and time never goes back. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from psa_store.observe import EventKind


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the curve."""

    time_s: float
    """Since 1970."""
    version: int
    committed: int
    term: int
    loss: float | None
    samples_per_s: float
    workers: int
    servers: int


@dataclass(frozen=True, slots=True)
class Event:
    """One event; of kinds that this version does not know, nothing is said."""

    time_s: float
    kind: EventKind
    text: str
    term: int | None
    version: int | None
    member: str


def read_points(documents: Iterable[Mapping[str, Any]]) -> tuple[tuple[Point, ...], float]:
    """The points that have a time and a version, and by how many seconds their clock has gone back, all in all."""
    points: list[Point] = []
    back_s, newest_s = 0.0, -math.inf
    for each in documents:
        time_s, version = _number(each, "time"), _number(each, "version")
        if time_s is None or version is None:
            continue
        if points:
            back_s += max(0.0, newest_s - time_s)
        newest_s = time_s
        points.append(
            Point(
                time_s=max(time_s, points[-1].time_s) if points else time_s,
                version=int(version),
                committed=int(_number(each, "committed") or 0),
                term=int(_number(each, "term") or 0),
                loss=_number(each, "loss"),
                samples_per_s=_number(each, "samples_per_s") or 0.0,
                workers=int(_number(each, "workers") or 0),
                servers=int(_number(each, "servers") or 0),
            )
        )
    return tuple(points), back_s


def read_events(documents: Iterable[Mapping[str, Any]]) -> tuple[Event, ...]:
    """The events of known kinds that have a time, in its order: several servers write, each when it comes to it."""
    events: list[Event] = []
    for each in documents:
        time_s = _number(each, "time")
        if time_s is None or each.get("kind") not in set(EventKind):
            continue
        term, version = _number(each, "term"), _number(each, "version")
        events.append(
            Event(
                time_s=time_s,
                kind=EventKind(each["kind"]),
                text=str(each.get("text", "")),
                term=None if term is None else int(term),
                version=None if version is None else int(version),
                member=str(each.get("member", "")),
            )
        )
    return tuple(sorted(events, key=lambda each: each.time_s))


def _number(document: Mapping[str, Any], name: str) -> float | None:
    value = document.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
