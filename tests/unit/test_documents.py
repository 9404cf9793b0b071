"""Documents of all rooms: what was written is read, what is unknown is ignored, another format is named."""

from __future__ import annotations

import ast
import importlib
import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

import psa_store
from psa_store.compression import parse_compression
from psa_store.errors import DataIntegrity
from psa_store.job.average import Average
from psa_store.job.config import JobConfig
from psa_store.job.document import from_text, to_fields, to_text
from psa_store.job.mode import parse_mode
from psa_store.observe.doctor.check import Check

PACKAGE = Path(psa_store.__file__).parent
EXAMPLES = {
    Average: {"decay": 0.5},
    JobConfig: {
        "name": "demo",
        "ranks": 2,
        "mode": parse_mode("local:steps=4,overlap"),
        "compression": parse_compression("topk:0.01"),
    },
    Check: {"fix": ""},
}
"""Values of documents that do not take any of the right type."""


def kinds() -> list[type[Any]]:
    """Every class of the package that gives a FORMAT."""
    return [
        getattr(importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)), node.name)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any(_gives_format(statement) for statement in node.body)
    ]


def _gives_format(statement: ast.stmt) -> bool:
    match statement:
        case ast.AnnAssign(target=ast.Name(id="FORMAT"), value=ast.Constant()):
            return True
    return False


def some(kind: Any) -> Any:
    """A value of a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return some(arguments[0])
    if origin in (Union, types.UnionType):
        return some(next(each for each in arguments if each is not types.NoneType))
    if origin is tuple:
        return tuple(some(each) for each in arguments if each is not Ellipsis)
    if origin in (dict, Mapping):
        return {some(arguments[0]): some(arguments[1])}
    if kind is Any:
        return [1, "a", None]
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return kind(**{field.name: some(hints[field.name]) for field in fields(kind)} | EXAMPLES.get(kind, {}))
    return next(iter(kind)) if issubclass(kind, Enum) else kind(1)


every_kind = pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)


@every_kind
def test_what_was_written_is_read(kind: type[Any]) -> None:
    document = some(kind)
    assert from_text(kind, to_text(document), "it") == document


@every_kind
def test_an_unknown_field_is_ignored(kind: type[Any]) -> None:
    document = some(kind)
    text = json.dumps({**to_fields(document), "from_a_newer_release": [1]})
    assert from_text(kind, text, "it") == document


@every_kind
@pytest.mark.parametrize("number", [0, 99, None, "1"])
def test_a_format_that_cannot_be_read_is_named_with_the_document_and_a_way_out(kind: type[Any], number: object) -> None:
    text = json.dumps({**to_fields(some(kind)), "format": number})
    with pytest.raises(DataIntegrity) as refused:
        from_text(kind, text, "this one")
    said = str(refused.value)
    assert said.startswith(f"this one has format {number!r}") and "use the release that wrote it" in said


@every_kind
@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "[" * 100_000])
def test_what_is_no_document_is_refused(kind: type[Any], text: str) -> None:
    with pytest.raises(DataIntegrity, match="this one cannot be read"):
        from_text(kind, text, "this one")
