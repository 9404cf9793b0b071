"""The two files of a report."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from psa_store.errors import UsageError
from psa_store.observe.report.page import page
from psa_store.observe.report.run import Run


def check_matplotlib() -> None:
    """Raise UsageError if there can be no picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("psa report needs matplotlib: pip install 'psa_store[report]'")


def write_report(run: Run, folder: Path) -> tuple[Path, Path]:
    """Write ``report-JOB.html`` and ``report-JOB.png`` into a folder, which is made; return their paths.

    Each appears whole or not at all; those of an earlier report are replaced.

    Raises:
        UsageError: matplotlib is not installed, or the folder cannot be written to.
    """
    check_matplotlib()
    from psa_store.observe.report.picture import draw

    picture = draw(run)
    paths = folder / f"report-{run.job}.html", folder / f"report-{run.job}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, (page(run, picture).encode(), picture), strict=True):
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                draft.write_bytes(content)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"the report cannot be written into {folder}: {error}. Use --out FOLDER.") from error
    return paths
