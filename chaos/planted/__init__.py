"""Bugs that psa_store does not have, planted by a test to see that the checker finds them.

The product knows nothing of this: a ``sitecustomize`` that Python imports at the start of every process of the job
replaces one method before anything runs.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

ENV = "CHAOS_PLANTED"
BUGS = {
    "no_fence": "Redis takes commits of a term that is over",
    "no_dedup": "a gradient that comes twice counts twice",
    "read_before_seal": "a controller reads the heads first, and seals later",
    "double_barrier": "members meet at Kazoo's DoubleBarrier",
    "ack_before_commit": "a version is said to be durable when its commit begins",
    "first_digest_only": "only the first chunk that is loaded is compared with its digest",
    "nonce_ignored": "a commit that came to nothing counts as done, if there is an earlier one of its version",
    "no_lease": "a server goes on serving when ZooKeeper may have declared it dead",
    "two_versions": "Redis keeps two versions of a shard",
    "living_sealed_late": "a controller reads the heads of living servers first, and seals them later",
}
"""The bugs that a job can be given; each is a module here with a function ``plant``."""


def environment(bug: str) -> dict[str, str]:
    """Return the environment that gives the processes of a job this bug."""
    assert bug in BUGS, bug
    here = Path(__file__).parent
    paths = [str(here / "site"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {ENV: bug, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def plant() -> None:
    """Plant the bug that the environment names."""
    bug = os.environ.get(ENV)
    if bug:
        importlib.import_module(f"chaos.planted.{bug}").plant()
