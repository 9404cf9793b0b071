"""The published JSON Schema of the status. ``python -m psa_store.observe.status.schema`` writes it.

It follows from the model: types from its annotations, descriptions from its docstrings. A test compares.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from psa_store.observe.status import model

PATH = Path(str(files("psa_store"))) / "docs" / "reference" / "status.schema.json"


def status_schema() -> dict[str, Any]:
    """The schema of one job's status, as `psa status JOB --json` prints it; without a job it prints a list of them."""
    schema = TypeAdapter(model.JobStatus).json_schema(mode="serialization")
    for name, definition in {"JobStatus": schema, **schema["$defs"]}.items():
        for field, text in _descriptions(getattr(model, name, object)).items():
            definition["properties"][field]["description"] = text
    schema["properties"] = {"format": {"const": model.JobStatus.FORMAT, "title": "Format"}, **schema["properties"]}
    schema["required"] = ["format", *schema["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _descriptions(kind: type) -> dict[str, str]:
    """By field of a dataclass, the string that stands below it."""
    if not hasattr(kind, "__dataclass_fields__"):
        return {}
    found = _descriptions(kind.__base__) if kind.__base__ else {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(description))):
                    found[field.target.id] = " ".join(description.split())
    return found


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(json.dumps(status_schema(), indent=2) + "\n")
