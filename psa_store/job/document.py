"""Documents: what is stored or sent as JSON is a frozen dataclass with a format number, one reader and one writer.

A reader ignores fields that it does not know, so a newer release may add some under the same number. A number that it
does not know is named, never guessed at. Types are checked on the way in (pydantic), so what comes out can be believed.

Pure: no I/O, no threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from psa_store.errors import DataIntegrity, UsageError


class Document(Protocol):
    """A dataclass that says which format it is."""

    FORMAT: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Any]]


D = TypeVar("D", bound=Document)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Damaged:
    """What stands where a document should, and is none: garbage, or of a format that this release can not read."""

    where: str
    """The path of a znode, or a key of Redis."""
    why: str
    version: int = 0
    """ZooKeeper's number of the text, by which exactly that is replaced."""
    kept: bool = True
    """Whether a living session, or nothing but the place itself, keeps it there; not so where a process should."""


_FORMAT_KEY = "format"
ADDED_LATER = {"added_later": True}
"""Metadata of a field that is written only where it differs from its default: documents that do without it stay as they
were before there was such a field, byte for byte."""


def to_fields(document: Document) -> dict[str, Any]:
    """The fields of a document and its format number, as JSON knows them."""
    written: dict[str, Any] = _adapter(type(document)).dump_python(document, mode="json")
    _leave_out_defaults(document, written)
    return {_FORMAT_KEY: document.FORMAT, **written}


def _leave_out_defaults(value: Any, written: Any) -> None:
    """Take those fields out of what was written of a value that were added later and have their defaults."""
    if is_dataclass(value) and isinstance(written, dict):
        for each in fields(value):
            held = getattr(value, each.name)
            if each.metadata == ADDED_LATER and held == each.default:
                del written[each.name]
            else:
                _leave_out_defaults(held, written[each.name])
    elif isinstance(value, tuple | list) and isinstance(written, list):
        for held, part in zip(value, written, strict=True):
            _leave_out_defaults(held, part)


def to_text(document: Document, *, indent: int | None = None) -> str:
    """Write a document down. The same document gives the same text."""
    return json.dumps(to_fields(document), indent=indent, separators=None if indent else (",", ":"))


def from_text(kind: type[D], text: str | bytes, what: str) -> D:
    """Read a document back.

    Args:
        kind: what it must be.
        what: names the document and its place in errors, as in "the plan in ZooKeeper".

    Raises:
        DataIntegrity: no such document, or of a format that this release does not know.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataIntegrity(f"{what} cannot be read: {error}") from error
    return from_fields(kind, fields, what)


def judged(parse: Callable[[str], T], text: str, where: str) -> T | Damaged:
    """What ``parse`` makes of a text, or why that is no such document."""
    try:
        return parse(text)
    except DataIntegrity as error:
        return Damaged(where, str(error))


def from_fields(kind: type[D], fields: Any, what: str) -> D:
    """The same for what has been taken out of its JSON already."""
    if not isinstance(fields, dict):
        raise DataIntegrity(f"{what} cannot be read: it is no JSON object")
    number = fields.get(_FORMAT_KEY)
    if number != kind.FORMAT:
        raise DataIntegrity(
            f"{what} has format {number!r}, and this release of psa_store reads format {kind.FORMAT} only: "
            "use the release that wrote it, or begin under another name of the job."
        )
    try:
        found: D = _adapter(kind).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataIntegrity(f"{what} cannot be read: {where}: {first['msg']}") from error
    except UsageError as error:  # of a document that checks itself
        raise DataIntegrity(f"{what} cannot be read: {error}") from error
    return found


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
