"""The commands of `psa`: each is found under its name, and none is imported before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import psa_store
from psa_store.cli.app import COMMANDS, app


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_tells_what_it_does(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0 and f" {name} " in shown.output
    assert get_command(app).commands[name].name == name  # type: ignore[attr-defined]


def test_the_list_of_commands_imports_none_of_them() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from psa_store.cli.app import COMMANDS, app\n"
        "shown = CliRunner().invoke(app, ['--help']).output\n"
        "assert all(f' {name} ' in shown for name in COMMANDS) and '--install-completion' in shown, shown\n"
        "print([m for m in sys.modules if m.startswith('psa_store.cli.') or m in ('torch', 'numpy', 'structlog')])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "['psa_store.cli.app']"


def test_commands_tell_their_options_without_loading_torch() -> None:
    code = (
        "import sys, psa_store.cli.app as psa\n"
        "names = 'run', 'doctor', 'status', 'report', 'up'\n"
        "print([name for name in names if psa.typer_of(name) and 'torch' in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"


def test_an_unknown_option_is_not_taken_for_the_script() -> None:
    command = [
        sys.executable,
        "-m",
        "psa_store.cli",
        "run",
        "--servrs",
        "2",
        "train.py",
    ]  # it sets the process's log up
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "no script --servrs; nor is there an option of that name" in refused.stderr


def test_the_version_is_told() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0 and shown.output == f"psa {psa_store.__version__}\n"


@pytest.mark.parametrize("arguments", [["-h"], ["run", "-h"], ["checkpoint", "ls", "-h"]])
def test_a_short_option_asks_for_help(arguments: list[str]) -> None:
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "Usage:" in shown.output
