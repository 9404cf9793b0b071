"""`psa bench`: from options to a run of the comparison, and from its results to tables, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from psa_store.bench.chart import check_matplotlib, draw
from psa_store.bench.document import to_document
from psa_store.bench.driver import run_bench
from psa_store.bench.report import print_report
from psa_store.bench.request import Bench
from psa_store.cli.signals import sigterm_interrupts
from psa_store.errors import UsageError


def compare(bench: Bench, json_path: Path | None, png_path: Path | None) -> None:
    """Measure, print, and write the files that were asked for.

    Raises:
        UsageError: a file cannot be written; nothing was measured.
        DependencyUnreachable: the private Redis or ZooKeeper does not start.
        UserCodeFailed: a contender died, or its parameters are not what its steps give.
    """
    for path in (json_path, png_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.absolute().parent}")
    if png_path is not None:
        check_matplotlib()
    progress = Console(stderr=True, highlight=False, style="dim")
    with sigterm_interrupts():
        comparison = run_bench(bench, progress.print)
    print_report(comparison, Console(highlight=False))
    if json_path is not None:
        json_path.write_text(json.dumps(to_document(comparison), indent=1) + "\n")
    if png_path is not None:
        draw(comparison, png_path)


def numbers(option: str, words: Sequence[str]) -> tuple[int, ...]:
    """The numbers of an option that may be repeated and may hold several, separated by commas; raises UsageError."""
    try:
        return tuple(int(part) for word in words for part in word.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {','.join(words)}: use numbers, for example {option} 2,4") from error
