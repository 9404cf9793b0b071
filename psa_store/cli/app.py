"""The commands of `psa` by name, each in a module that is imported when the command is used, and the exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import psa_store
from psa_store import logs
from psa_store.errors import PsaError

EXIT_CODES = """
Exit codes: 0 done (or left cleanly on SIGTERM) · 1 user code failed, or restarts used up · 2 bad usage, or the job
does not fit · 3 Redis or ZooKeeper unreachable or unfit · 4 stored data damaged · 130 interrupted.
"""
COMMANDS = {
    "run": ("run", "Train: start workers and servers on this machine, watch them, restart what dies."),
    "server": ("members", "Serve shards of a job until SIGTERM; then hand them over and exit."),
    "worker": ("members", "Run a training script as one more worker of its job."),
    "estimate": ("estimate", "Tell what a job would take: bytes a step sends, memory of Redis, time."),
    "up": ("up", "Start a private Redis and ZooKeeper in the background."),
    "down": ("up", "Stop the private Redis and ZooKeeper that `psa up` started."),
    "status": ("status", "Show what is sick, what each process does, and what is stored."),
    "report": ("report", "Tell what became of a job: loss, throughput, each failure and its cost."),
    "config": ("config", "Settings: from flags, else PSA_* variables, else psa.toml, else defaults."),
    "doctor": ("doctor", "Check this machine, Redis and ZooKeeper, and say how to mend them."),
    "bench": ("bench", "Measure a step beside peers and the limits of this machine."),
    "job": ("job", "A job as a whole: change its numbers, remove it."),
    "checkpoint": ("checkpoint", "Versions that are kept: take, compare, check, go back to, fork, move to files."),
    "chaos": ("chaos", "Prove the promises: train while nodes are killed, paused and cut off."),
}
"""Name of each command: its module in this package, which has it in ``app``, and the line of `psa --help` about it."""


def typer_of(name: str) -> typer.Typer:
    """The typer of a command, or of a group; it may have further commands, which share a module."""
    found: typer.Typer = import_module(f"psa_store.cli.{COMMANDS[name][0]}").app
    return found


class _Commands(MutableMapping[str, Any]):
    """The commands, each imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        found: Any = get_command(typer_of(name))
        return getattr(found, "commands", {}).get(name, found)  # a module may have several commands

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __setitem__(self, name: str, command: Any) -> None:
        raise TypeError("commands stand in COMMANDS")

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands stand in COMMANDS")


class _Psa(TyperGroup):
    """Lists its commands without importing them, for `psa --help` and for completion."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._arguments = arguments
        self.commands = _Commands()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        return self._listing().shell_complete(ctx, incomplete)

    def _listing(self) -> TyperGroup:
        lines = {name: TyperCommand(name, help=line) for name, (_, line) in COMMANDS.items()}
        return TyperGroup(**{**self._arguments, "commands": lines, "params": self.params})


app = typer.Typer(
    name="psa",
    cls=_Psa,
    help="A fault-tolerant parameter server for PyTorch: versioned shards in Redis, coordination in ZooKeeper.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"psa {psa_store.__version__}")
        raise typer.Exit


@app.callback()
def _psa(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="tell the version of psa_store")
    ] = False,
) -> None:
    """Options of a command stand behind its name."""


def main() -> None:
    """Entry point: run a command, and turn errors into one line and an exit code."""
    try:
        app(standalone_mode=True)
    except PsaError as error:
        logs.complain(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
