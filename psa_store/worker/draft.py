"""A job that its Worker writes down instead of training: how `psa estimate` asks a script.

A script decides about its model and optimizer in code, so it has to run, up to its first ``psa.Worker``. `psa estimate`
runs it as a process of its own, with the name of a file in ``PSA_DRAFT``; neither Redis nor ZooKeeper is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.document import from_text, to_text
from psa_store.job.layout import Layout, layout_from_json


@dataclass(frozen=True, slots=True)
class Draft:
    """A job before it exists: two documents as they would be stored, and what the script says of its worker."""

    FORMAT: ClassVar[int] = 1

    config: str
    layout: str
    resident_stages: int | None = None


def write_draft(config: JobConfig, layout: Layout, resident_stages: int | None, path: Path) -> None:
    """Write a job down, and how many stages its worker would have in memory at once."""
    path.write_text(to_text(Draft(config.to_json(), layout.to_json(), resident_stages)))


def read_draft(path: Path) -> tuple[JobConfig, Layout, int | None] | None:
    """The job that was written down there; None for none. Raises DataIntegrity if it cannot be read."""
    if not path.exists() or not (text := path.read_text()):
        return None
    draft = from_text(Draft, text, f"the draft of a job in {path}")
    return job_config_from_json(draft.config), layout_from_json(draft.layout), draft.resident_stages
