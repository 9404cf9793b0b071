"""`psa up` and `psa down`: a private Redis and ZooKeeper in the background."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from psa_store import launch
from psa_store.cli.options import begin
from psa_store.errors import UsageError

app = typer.Typer()


@app.command()
def up(
    ensemble: Annotated[int, typer.Option(help="ZooKeeper nodes: 1 or 3")] = 1,
    tcp: Annotated[
        bool, typer.Option("--tcp", help="Redis listens on a port of this machine, not only on its socket")
    ] = False,
) -> None:
    """Start a private Redis and ZooKeeper in the background; `psa down` stops them, their data stay in PSA_HOME.

    They are for this user alone: other commands and scripts find addresses and passwords in PSA_HOME.
    """
    if ensemble not in (1, 3):
        raise UsageError(f"--ensemble {ensemble}: use 1 or 3")
    settings = begin("up")
    launch.up(settings.home, ensemble, tcp=tcp)
    typer.echo(f"export PSA_HOME={shlex.quote(str(settings.home.absolute()))}")


@app.command()
def down() -> None:
    """Stop the private Redis and ZooKeeper that `psa up` started. Data stay."""
    settings = begin("down")
    typer.echo("stopped" if launch.down(settings.home) else f"nothing is running in {settings.home}")
