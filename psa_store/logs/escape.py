"""Escape what would act on a terminal, a page or a reader instead of being shown. Pure.

Ids, names and texts of other processes come from znodes and Redis, where a hostile process may have written them: an
ESC that clears the screen, a carriage return that hides a line, a mark that turns the direction of what follows. One
place for all that is shown: the log, messages of errors, the status, the report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")

# C0 and C1, zero width, line and paragraph ends, direction (also isolates), byte order mark, halves of a pair.
_ACTS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]",
)
_ACTS_IN_LINES = re.compile(_ACTS.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def escaped(value: T) -> T:
    """Return a text as it may be shown, or a dataclass, mapping or sequence of which all texts are so."""
    return _escaped(value)  # type: ignore[no-any-return]


def escaped_lines(text: str) -> str:
    """The same for a text of our own of several lines, such as a traceback: line ends and tabs stay."""
    return _ACTS_IN_LINES.sub(_code, text)


def _escaped(value: Any) -> Any:
    if type(value) is str:  # an enum is ours
        return _ACTS.sub(_code, value)
    if isinstance(value, Mapping):
        return {_escaped(key): _escaped(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_escaped, value))
    if is_dataclass(value) and not isinstance(value, type):
        changes = {}
        for each in fields(value):
            held = getattr(value, each.name)
            new = _escaped(held)
            if new != held:
                changes[each.name] = new
        return replace(value, **changes) if changes else value
    return value


def _code(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
