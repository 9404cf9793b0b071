"""Documents of all rooms: what was written is read, what is unknown is ignored, another format is named."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import psa_store
from psa_store.cluster.members import Member
from psa_store.cluster.plan import Plan, Server
from psa_store.errors import DataIntegrity
from psa_store.job.config import JobConfig
from psa_store.job.document import from_text, to_fields, to_text
from psa_store.job.layout import StoredLayout, TensorRole, TensorSpec
from psa_store.job.mode import parse_mode
from psa_store.launch import Addresses
from psa_store.optim import AdamW
from psa_store.worker.draft import Draft

EXAMPLES: list[Any] = [
    Addresses("unix:///r", "127.0.0.1:1"),
    Draft("{}", "{}"),
    JobConfig("demo", 2, 0, AdamW().to_dict(), "f" * 64, mode=parse_mode("local:steps=4,overlap")),
    Member("server-1", "host", 7, address="10.0.0.1:2"),
    Plan(1, 1, 0, (Server("server-1", "10.0.0.1:2", "", "host"),), (0, 0), ("worker-1",)),
    StoredLayout(4096, (TensorSpec(("a", "b"), (2, 3), "float32", TensorRole.TRAINED),)),
]
"""One of each kind, from all rooms."""
every_kind = pytest.mark.parametrize("document", EXAMPLES, ids=lambda document: type(document).__name__)


def test_each_kind_has_an_example() -> None:
    found = {
        node.name
        for path in Path(psa_store.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any(_gives_format(each) for each in node.body)
    }
    assert found == {type(document).__name__ for document in EXAMPLES}


def _gives_format(statement: ast.stmt) -> bool:
    match statement:
        case ast.AnnAssign(target=ast.Name(id="FORMAT"), value=ast.Constant()):
            return True
    return False


@every_kind
def test_what_was_written_is_read(document: Any) -> None:
    assert from_text(type(document), to_text(document), "it") == document


@every_kind
def test_an_unknown_field_is_ignored(document: Any) -> None:
    text = json.dumps({**to_fields(document), "from_a_newer_release": [1]})
    assert from_text(type(document), text, "it") == document


@every_kind
@pytest.mark.parametrize("number", [0, 99, None, "1"])
def test_a_format_that_cannot_be_read_is_named_with_the_document_and_a_way_out(document: Any, number: object) -> None:
    text = json.dumps({**to_fields(document), "format": number})
    with pytest.raises(DataIntegrity) as refused:
        from_text(type(document), text, "this one")
    said = str(refused.value)
    assert said.startswith(f"this one has format {number!r}") and "use the release that wrote it" in said


@every_kind
@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "[" * 100_000])
def test_what_is_no_document_is_refused(document: Any, text: str) -> None:
    with pytest.raises(DataIntegrity, match="this one cannot be read"):
        from_text(type(document), text, "this one")
