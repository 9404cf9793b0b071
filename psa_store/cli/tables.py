"""Tables that commands print: whole in a pipe, and with the names that are there to be copied whole everywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WHOLE = 10_000
"""Columns of what is no terminal: nothing is cut or wrapped for them."""
_BESIDE = 48
"""Columns that are left for what stands beside a name."""


def printer() -> Console:
    """Prints as wide as the terminal is, or COLUMNS says; into a pipe or a file as wide as a line is."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WHOLE
    return console


def print_named(table: Table, names: Sequence[str], console: Console) -> None:
    """Print a table whose first column has names: they are not cut, if need be the terminal wraps its lines."""
    longest = max(map(len, names), default=0)
    first = table.columns[0]
    first.no_wrap, first.min_width = True, longest
    console.print(table, width=max(console.width, longest + _BESIDE), crop=False, no_wrap=False)


def plain(*cells: object) -> list[Text]:
    """Cells in which a bracket is no markup."""
    return [Text(str(cell)) for cell in cells]
