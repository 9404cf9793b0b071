"""`psa config show`: every setting, its value and its meaning, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from psa_store.cli.options import Json, begin
from psa_store.cli.tables import printer
from psa_store.config import FOR_PEOPLE, Settings, origins
from psa_store.logs import HIDDEN, hide_passwords, names_secret, printable, printable_hosts

app = typer.Typer(name="config", help="Settings: from flags, else PSA_* variables, else psa.toml, else defaults.")


@app.callback()
def _settings() -> None:
    """There may be more to do with settings than to show them."""


@app.command("show")
def config_show(
    origin: Annotated[bool, typer.Option("--origin", help="also where each value comes from")] = False,
    as_json: Json = False,
) -> None:
    """Show each setting, its value and its meaning. Passwords are hidden.

    psa.toml is the one in the current directory, or the file that PSA_CONFIG names. Its keys are the names shown here.

    Example: psa config show --origin
    """
    show(origin, as_json, begin("config"))


def show(with_origin: bool, as_json: bool, settings: Settings) -> None:
    """Print the settings; passwords are hidden."""
    found_values = settings.model_dump(mode="json")
    values = {name: hide_passwords(its) if isinstance(its, str) else its for name, its in found_values.items()}
    # Where a secret lies is none.
    values |= {name: HIDDEN for name in values if names_secret(name) and isinstance(getattr(settings, name), str)}
    if settings.redis is not None:
        values["redis"] = printable(settings.redis)
    if settings.zookeeper is not None:
        values["zookeeper"] = printable_hosts(settings.zookeeper)
    found = origins() if with_origin else {}
    document = {
        name: {
            "value": values[name],
            **({"origin": found[name]} if with_origin else {}),
            "meaning": Settings.model_fields[name].description,
        }
        for name in FOR_PEOPLE
    }
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        # Values are not ours: a bracket in a path is no markup, and a port is no emoji.
        printer().print(_table(document, with_origin))


def _table(document: dict[str, dict[str, object]], with_origin: bool) -> Table:
    table = Table("setting")
    for heading in ["value", "origin"] if with_origin else ["value"]:
        table.add_column(heading, overflow="fold")
    table.add_column("meaning")
    for name, cells in document.items():
        table.add_row(name, *("-" if cell is None else str(cell) for cell in cells.values()))
    return table
