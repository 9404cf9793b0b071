"""Documents of all rooms: what was written is read, what is unknown is ignored, another format is named."""

from __future__ import annotations

import ast
import importlib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import pytest

import psa_store
from psa_store.cluster import Plan
from psa_store.compression import parse_compression
from psa_store.errors import DataIntegrity
from psa_store.job.average import Average
from psa_store.job.config import JobConfig
from psa_store.job.document import ADDED_LATER, from_text, to_fields, to_text
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
    Plan: {"owners": (0,)},
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


@dataclass(frozen=True)
class Part:
    name: str
    weight: float = field(default=1.0, metadata=ADDED_LATER)


@dataclass(frozen=True)
class Whole:
    """A document that has gained fields, at all depths."""

    FORMAT: ClassVar[int] = 1

    one: Part
    several: tuple[Part, ...]
    nested: tuple[tuple[Part, ...], ...] = ()
    rest: dict[str, Any] = field(default_factory=dict)
    perhaps: Part | None = field(default=None, metadata=ADDED_LATER)
    color: str = field(default="", metadata=ADDED_LATER)


def test_a_field_that_was_added_later_is_written_only_where_it_differs_from_its_default_at_any_depth() -> None:
    old, new = Part("old"), Part("new", 2.0)
    document = Whole(old, (old, new), ((new,), (old, old)), {"weight": 1.0, "color": ""})
    named, weighed = {"name": "old"}, {"name": "new", "weight": 2.0}
    assert to_fields(document) == {
        "format": 1,
        "one": named,
        "several": [named, weighed],
        "nested": [[weighed], [named, named]],
        "rest": {"weight": 1.0, "color": ""},
    }
    assert from_text(Whole, to_text(document), "it") == document


def test_one_that_differs_is_written_with_all_that_is_in_it() -> None:
    document = Whole(Part("one"), (), perhaps=Part("perhaps"), color="red")
    written = to_fields(document)
    assert (written["perhaps"], written["color"]) == ({"name": "perhaps"}, "red")
    assert from_text(Whole, to_text(document), "it") == document


def test_a_job_without_stages_is_written_as_before_there_were_any() -> None:
    """Golden value: an older release reads it."""
    assert JobConfig("demo", 2, 0, {"name": "SGD"}, "fingerprint").to_json() == (
        '{"format":1,"name":"demo","ranks":2,"seed":0,"optimizer":{"name":"SGD"},"layout":"fingerprint",'
        '"commit_every":50,"skip_nonfinite":false,"mode":"sync","compression":"none"}'
    )
