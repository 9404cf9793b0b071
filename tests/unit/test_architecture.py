"""The arrows between rooms point down, each door is the only one that knows its library, and the public names stand."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

import psa_store
from psa_store.job.mode import Mode

PACKAGE = Path(psa_store.__file__).parent

# Lower numbers may not import higher ones; rooms of the same number may not import each other.
FLOORS = {
    "errors": 0,
    "logs": 1,
    "testing": 1,
    "compression": 1,
    "job": 2,
    "config": 3,
    "optim": 3,
    "cluster": 3,
    "consistency": 4,
    "storage": 5,
    "coordination": 5,
    "wire": 5,
    "checkpoint": 6,
    "observe": 7,
    "worker": 8,
    "server": 8,
    "store": 8,
    "launch": 9,
    "integrations": 9,
    "estimate": 9,
    "examples": 9,
    "bench": 10,
    "cli": 11,
}
PURE = ("consistency", "cluster", "job")
DOORS = {"kazoo": "coordination", "redis": "storage", "socket": "wire"}
ALSO_SOCKETS = {
    "server",
    "launch",
    "observe/endpoint.py",
    "coordination/client.py",
    "bench/contenders/stream.py",
    "bench/contenders/redis_values.py",
}
"""Places that hold or pass sockets which wire made, look for a free port, bound the sockets of their library, or
measure what plain sockets can do."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("psa_store.")}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    for other in rooms_imported(path) - {here}:
        assert FLOORS[other] < FLOORS[here], f"{here} imports {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_door_alone_knows_its_library(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(path)}
    where = str(path.relative_to(PACKAGE))
    for library, door in DOORS.items():
        if library in used and room(path) != door:
            allowed = library == "socket" and (where in ALSO_SOCKETS or room(path) in ALSO_SOCKETS)
            assert allowed, f"{where} imports {library}; only {door} may"


@pytest.mark.parametrize("name", PURE)
def test_thought_is_pure(name: str) -> None:
    files = [path for path in modules() if room(path) == name]
    assert files
    used = {each.split(".")[0] for path in files for each in imports(path)}
    assert not used & {"os", "socket", "threading", "time", "torch", "redis", "kazoo", "subprocess"}


MODE_ROOMS = ("job", "consistency", "worker/strategy", "server/aggregator")
"""The rooms in which a mode makes a difference. The others ask ``JobConfig`` what that means for them."""
MODE_FACTS = {field.name for field in fields(Mode)} | {
    name for name, value in vars(Mode).items() if isinstance(value, property) or inspect.isfunction(value)
}


def asks_the_mode(path: Path) -> bool:
    """Whether a file reads what a mode is made of: ``mode.on_arrival``, ``config.mode.steps``, ``ModeName.LOCAL``."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id="ModeName")) | ast.Compare(comparators=[ast.Name(id="SYNC")]):
                return True
            case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr=fact):
                if owner.strip("_") == "mode" and fact in MODE_FACTS:
                    return True
    return False


def test_the_mode_makes_a_difference_in_its_rooms_only() -> None:
    elsewhere = {
        where
        for path in modules()
        if not (where := str(path.relative_to(PACKAGE))).startswith(MODE_ROOMS) and asks_the_mode(path)
    }
    assert elsewhere == set(), "ask JobConfig, or decide in consistency"


def test_public_names() -> None:
    assert psa_store.__all__ == ["Store", "Worker", "ema", "errors", "optim", "split"]
    assert all(hasattr(psa_store, name) for name in psa_store.__all__)


def test_received_bytes_are_never_unpickled() -> None:
    for path in modules():
        text = path.read_text()
        assert "pickle" not in {name.split(".")[0] for name in imports(path)}, path
        assert "torch.load" not in text, path
