"""Asks a training script what job it would create: runs it, as a process of its own, up to its first ``psa.Worker``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from psa_store.errors import UsageError, UserCodeFailed
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout
from psa_store.worker.draft import read_draft


def ask_script(
    script: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float
) -> tuple[JobConfig, Layout, int | None]:
    """Run ``python script arguments…`` until it makes a Worker. What it prints goes to standard error.

    ``script``: its path, or ``-m`` and the name of a module. The number is that of ``psa.Worker(resident_stages=)``.

    Raises:
        UserCodeFailed: it failed, or took longer than ``timeout_s``.
        UsageError: it ended without a Worker.
    """
    with tempfile.TemporaryDirectory(prefix="psa-estimate-") as folder:
        path = Path(folder) / "draft.json"
        try:
            done = subprocess.run(
                [sys.executable, *script, *arguments],
                env={**environment, "PSA_DRAFT": str(path)},
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserCodeFailed(
                f"{script[-1]} has made no psa.Worker in {timeout_s:g} s, and was ended. "
                "Make the Worker before anything that takes long, as training does."
            ) from None
        found = read_draft(path)
    if found is not None:
        return found
    if done.returncode != 0:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise UserCodeFailed(f"{script[-1]} ended with {how} before it made a psa.Worker; what it printed stands above")
    raise UsageError(
        f"{script[-1]} ended without making a psa.Worker, so there is nothing to estimate. Give it the arguments "
        "with which it trains, and see that it trains when run as a program."
    )
