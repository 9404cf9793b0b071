"""`psa doctor`: what the doctor found, printed as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from psa_store.config import Settings
from psa_store.job.document import to_text
from psa_store.launch import fill_addresses
from psa_store.observe import doctor
from psa_store.observe.doctor import Check, Verdict

_UNFIT = 3
_STYLES = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def examine(job: str | None, as_json: bool, settings: Settings) -> int:
    """Examine, print, and return the exit code.

    Raises:
        UsageError: no address of Redis or ZooKeeper is known.
        UnknownJob: there is no such job.
    """
    settings = fill_addresses(settings)
    assert settings.redis is not None and settings.zookeeper is not None
    found = doctor.examine(
        settings.redis,
        settings.zookeeper,
        job,
        session_timeout_s=settings.session_timeout_s,
        timeout_s=settings.connect_timeout_s,
    )
    if as_json:
        print(to_text(found, indent=1))
    else:
        Console(highlight=False).print(_table(found.checks))
    return 0 if found.fit else _UNFIT


def _table(checks: Sequence[Check]) -> Table:
    """One row each; below what was found, how to mend it. Text and not markup: addresses may hold brackets."""
    table = Table("check", "", "found")
    for check in checks:
        cell = Text(check.found)
        if check.fix:
            cell.append(f"\n→ {check.fix}", style="bold")
        table.add_row(check.name, Text(check.verdict.upper(), style=_STYLES[check.verdict]), cell)
    return table
