"""The report of a campaign: one page and one picture."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from chaos.report.page import page
from chaos.report.picture import draw
from chaos.report.run import Run

__all__ = ["Run", "write_report"]


def write_report(runs: Sequence[Run], folder: Path) -> None:
    """Write ``report.html``, which holds everything, and ``report.png``, the picture of its longest run."""
    drawable = [run for run in runs if run.history is not None and run.verdict.wall_s > 0]
    longest = max(drawable, key=lambda run: run.verdict.wall_s, default=None)
    picture = ""
    if longest is not None:
        draw(longest, folder / "report.png")
        picture = base64.b64encode((folder / "report.png").read_bytes()).decode()
    (folder / "report.html").write_text(page(runs, longest, picture))
