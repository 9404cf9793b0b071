"""What a training script would create, written down by its Worker instead of training: how `psa estimate` asks a
script.

A script decides about its model and optimizer in code, so it has to run, up to its first ``psa.Worker``. `psa estimate`
runs it as a process of its own, with the name of a file in ``PSA_DRAFT``; neither Redis nor ZooKeeper is needed.
"""

from __future__ import annotations

import json
from pathlib import Path

from psa_store.errors import DataIntegrity
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.layout import Layout, layout_from_json


def draft_of(config: JobConfig, layout: Layout, path: Path) -> None:
    """Write a job down."""
    path.write_text(json.dumps([config.to_json(), layout.to_json()]))


def read_draft(path: Path) -> tuple[JobConfig, Layout] | None:
    """The job that was written down there; None for none. Raises DataIntegrity if that is no such text."""
    if not path.exists() or not (text := path.read_text()):
        return None
    try:
        config, layout = json.loads(text)
    except ValueError as error:
        raise DataIntegrity(f"{path} holds no draft of a job: {error}") from error
    return job_config_from_json(config), layout_from_json(layout)
