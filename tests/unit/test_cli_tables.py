"""Tables of commands: names are whole at any width, and a pipe gets whole lines."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from psa_store.cli.tables import plain, print_named, printer


def shown(name: str, width: int) -> list[str]:
    table = Table("checkpoint", "version", "taken", "why")
    table.add_row(*plain(name, 120, "2026-11-26 23:00:00", "[asked] by a person, some words about the reason"))
    console = Console(width=width, file=StringIO(), record=True, markup=False)
    print_named(table, [name], console)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [20, 80, 200])
@pytest.mark.parametrize("name", ["short", "before-the-learning-rate-was-changed-for-the-second-time", "n" * 100])
def test_a_name_stands_whole_on_one_line(name: str, width: int) -> None:
    assert any(name in line for line in shown(name, width))


def test_a_bracket_is_no_markup() -> None:
    assert any("[asked]" in line for line in shown("short", 200))


def test_a_pipe_gets_whole_lines_unless_columns_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout", StringIO())
    assert printer().width > 1000
    monkeypatch.setenv("COLUMNS", "90")
    assert printer().width == 90
