"""What a monitor asks of the process that it belongs to. Workers and servers answer, each in its room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Health(Protocol):
    """The monitored process. Everything may be called by any thread, and answers at once."""

    @property
    def member(self) -> str:
        """Its present id; it is another after its ZooKeeper session has expired."""

    def refresh(self) -> None:
        """Bring those metrics up to date that nobody writes as things happen. For the monitor's thread only."""

    def describe(self) -> Mapping[str, Any]:
        """The parts of a heartbeat that only this role has, and its stage."""

    def why_sick(self) -> str:
        """Why this process should be replaced; empty if it lives."""

    def why_not_ready(self) -> str:
        """Why it does not take part in the job now; empty if it does."""
