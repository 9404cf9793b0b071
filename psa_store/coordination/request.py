"""A request for a checkpoint: the document that lies in ZooKeeper until the checkpoint is taken or not wanted any more.

Only ``coordination.py`` reads and writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from psa_store.job.document import from_text, to_text


@dataclass(frozen=True, slots=True)
class CheckpointRequest:
    """What is asked for, and what was answered. Its name is that of its znode."""

    FORMAT: ClassVar[int] = 1

    named: bool = False
    """Whether a person gave the name."""
    failed: str = ""
    """The answer, if it cannot be taken: why."""

    def to_json(self) -> str:
        return to_text(self)


def request_from_json(text: str) -> CheckpointRequest:
    """Read a request back; raises DataIntegrity if the text is none."""
    return from_text(CheckpointRequest, text, "a request for a checkpoint in ZooKeeper")
