"""`psa doctor`: what the doctor found, printed as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from psa_store.cli.options import Json, begin
from psa_store.cli.tables import printer
from psa_store.config import Settings, fill_addresses
from psa_store.job.document import to_text
from psa_store.observe import doctor
from psa_store.observe.doctor import Check, Verdict

_UNFIT = 3
_STYLES = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}

app = typer.Typer()


@app.command("doctor")
def doctor_command(
    job: Annotated[str | None, typer.Argument(help="job whose versions must fit into Redis [default: none]")] = None,
    as_json: Json = False,
) -> None:
    """Check this machine, Redis and ZooKeeper: versions, durability, memory, quorum, speed; and say how to mend them.

    Takes seconds, and may be run beside a job: it moves 32 MiB through Redis where there is room, and does once what
    jobs do with Redis and ZooKeeper, in keys and a znode of its own that it removes. A command that an ACL refuses is
    named. Exits with 3 if anything is unfit.

    Example: PSA_REDIS=redis://db:6379 PSA_ZOOKEEPER=zk1:2181,zk2:2181,zk3:2181 psa doctor shakespeare
    """
    raise typer.Exit(examine(job, as_json, begin("doctor")))


def examine(job: str | None, as_json: bool, settings: Settings) -> int:
    """Examine, print, and return the exit code.

    Raises:
        UsageError: no address of Redis or ZooKeeper is known.
        UnknownJob: there is no such job.
    """
    found = doctor.examine(fill_addresses(settings), job)
    if as_json:
        print(to_text(found, indent=1))
    else:
        printer().print(_table(found.checks))
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
