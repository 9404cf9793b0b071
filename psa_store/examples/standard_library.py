"""Examples for each task that are on every machine: what the functions of Python's standard library say of themselves.

They show that a task runs, and are few and hard: little of what a function does is in its name.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NEIGHBOURS = 3
"""Functions among which a question is to find one."""

_FUNCTION = re.compile(r'^ *(def (\w+)\([^()]*\)):\n +r?"""(.+?)"""', re.MULTILINE | re.DOTALL)
"""A pattern, not Python's parser: it finds two thirds of them, in a twentieth of the time."""
_PARAGRAPHS_END = re.compile(r"\n\s*\n")

Example = tuple[tuple[str, ...], str]
"""Texts to read, and the text to write for them."""


@dataclass(frozen=True, slots=True)
class Function:
    """``summary``: the first paragraph of its docstring; ``rest``: the others, "" if there are none."""

    name: str
    header: str
    summary: str
    rest: str


def functions() -> list[Function]:
    """Those with a docstring, file by file."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for header, name, docstring in _FUNCTION.findall(path.read_text(encoding="utf-8")):
            summary, *rest = _PARAGRAPHS_END.split(docstring.strip(), maxsplit=1)
            found.append(Function(name, *(" ".join(text.split()) for text in (header, summary, "".join(rest)))))
    return found


def headers() -> list[Example]:
    """From Python to English: the header of a function, and its summary."""
    return [((each.header,), each.summary) for each in functions() if each.summary]


def summaries() -> list[Example]:
    """The rest of a docstring, and its summary."""
    return [((each.rest,), each.summary) for each in functions() if each.summary and each.rest]


def questions() -> list[Example]:
    """What does a function do? The answer is among the summaries of its neighbours."""
    found = [each for each in functions() if each.summary]
    examples: list[Example] = []
    for first in range(0, len(found), NEIGHBOURS):
        group = found[first : first + NEIGHBOURS]
        context = " ".join(f"{each.name}: {each.summary}" for each in group)
        examples += [((f"What does {each.name} do?", context), each.summary) for each in group]
    return examples


EXAMPLES: dict[str, Callable[[], list[Example]]] = {
    "translate": headers,
    "summarise": summaries,
    "answer": questions,
}
