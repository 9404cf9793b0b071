"""What a monitor needs to know of its process. Workers and servers implement it, each in its room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from psa_store.cluster import Cell
from psa_store.logs import Wait
from psa_store.observe.heartbeat import Reported

COMPUTING, WAITING = "computing", "waiting"
"""Stages of a worker: between a batch and its step, and in the step until the next batch."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What a process does now: the part of its heartbeat that only its role knows."""

    stage: str
    shards: int = 0
    """That a server owns."""
    ranks: tuple[int, ...] = ()
    """That the plan gives to a worker."""
    stages: int = 1
    """Of the model."""
    cells: tuple[Cell, ...] = ()
    """Which stages of its ranks a worker computes, where there are several."""
    waits_for: tuple[Cell, ...] = ()
    """Cells of other workers of which something must arrive before a worker can go on with its step ..."""
    waits_s: float | None = None
    """... and for how long it has waited."""
    held_up: Wait | None = None
    """What it waits for longer than is usual."""
    reported: Mapping[int, Reported] = field(default_factory=dict)
    """By rank, what a script said with its newest step."""


class Health(Protocol):
    """The monitored process. Everything may be called by any thread, and answers at once."""

    @property
    def member(self) -> str:
        """Its present id; it is another after its ZooKeeper session has expired."""

    def refresh(self) -> None:
        """Bring those metrics up to date that are not written as things happen. For the monitor's thread only."""

    @property
    def activity(self) -> Activity:
        """What it does now."""

    def why_not_alive(self) -> str:
        """Why this process should be replaced; empty if it need not be."""

    def why_not_ready(self) -> str:
        """Why it does not take part in the job now; empty if it does."""
