"""What commands have in common: options, how a command begins, and how SIGTERM ends it. Imports nothing heavy."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from psa_store import logs
from psa_store.config import Settings, check_environment, fill_addresses, load_settings
from psa_store.config.own_files import refuse_foreign_script
from psa_store.errors import UsageError

if TYPE_CHECKING:
    from psa_store.launch.processes import Program

Script = Annotated[str, typer.Argument(help="training script; what follows it are its arguments")]
Module = Annotated[bool, typer.Option("-m", "--module", help="the script is the name of a module, as in `python -m`")]
Job = Annotated[str, typer.Argument(help="name of the job")]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask")]
Json = Annotated[bool, typer.Option("--json", help="for programs")]
LogJson = Annotated[bool, typer.Option("--log-json", help="log as JSON, one object a line, for programs")]

SCRIPT = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
"""Context of a command whose arguments after the script are the script's."""


def begin(role: str, *, log_json: bool = False) -> Settings:
    """Read the settings, and log as they say."""
    settings = read_settings()
    if log_json:
        settings = settings.model_copy(update={"log_json": True})
    logs.configure(settings.log_level, role, as_json=settings.log_json)
    return settings


def reach(role: str) -> Settings:
    """The same with the addresses of Redis and ZooKeeper: those of the settings, or of the private ones that run."""
    return fill_addresses(begin(role))


def read_settings() -> Settings:
    """For commands that log nothing: structlog takes as long to import as all the rest."""
    check_environment()
    return load_settings()


def check_script(script: str, module: bool) -> Program:
    """Return the program of that name.

    Raises:
        UsageError: it is a script, and there is no such file, or another user may have put it there.
    """
    from psa_store.launch.processes import Program

    if not module and not Path(script).is_file():
        meant = "; nor is there an option of that name" if script.startswith("-") else ""
        raise UsageError(f"no script {script}{meant}")
    if not module:
        refuse_foreign_script(Path(script))
    return Program(script, module)


def confirm(what: str, yes: bool) -> None:
    """Ask, unless that was answered beforehand; raises UsageError where no person can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{what} Confirm with --yes.")
    typer.confirm(f"{what} Go on?", abort=True)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: by an exception, so that everything is cleaned up."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
