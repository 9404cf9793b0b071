"""The documentation is current: the generated reference, the links, the paths, the commands and options it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from psa_store.cli.app import app
from tests import reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "psa_store" / "docs"
TEXTS = [
    ROOT / "README.md",
    *(ROOT / ".github").glob("*.md"),
    ROOT / "deploy" / "README.md",
    ROOT / "chaos" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
README_LINES_MAX = 150


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name", sorted(reference.pages()))
def test_the_reference_is_current(name: str) -> None:
    committed = reference.FOLDER / name
    assert committed.is_file() and committed.read_text() == reference.pages()[name], f"run `{reference.COMMAND}`"


def test_the_reference_has_no_other_pages() -> None:
    assert {path.name for path in reference.FOLDER.glob("*.md")} == set(reference.pages())


@pytest.mark.parametrize("path", TEXTS, ids=names)
def test_a_link_names_a_file_that_exists(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", TEXTS, ids=names)
def test_a_path_that_is_named_exists(path: Path) -> None:
    for found in re.findall(r"`((?:psa_store|tests|chaos|deploy|\.github)/[\w./-]*)`", path.read_text()):
        assert (ROOT / found).exists(), found


@pytest.mark.parametrize("path", TEXTS, ids=names)
def test_a_command_that_is_named_exists_with_its_options(path: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^(?:\$ |[A-Z_]+=\S+ )*psa ([^#\n|<>]+)", path.read_text(), re.MULTILINE):
        words = line.split()
        command = commands.get(words[0])
        assert command is not None, line
        if hasattr(command, "commands"):
            command = command.commands.get(words[1])
            assert command is not None, line
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[1:]:
            if word.endswith(".py"):
                break  # what follows are options of the script
            if word.startswith("--"):
                assert word.partition("=")[0] in known, line


@pytest.mark.parametrize("path", TEXTS, ids=names)
def test_a_benchmark_that_is_named_exists(path: Path) -> None:
    for module in re.findall(r"python -m (tests[\w.]+)", path.read_text()):
        name = module.removesuffix(".NAME").replace(".", "/")
        assert (ROOT / f"{name}.py").is_file() or (ROOT / name).is_dir(), module


@pytest.mark.parametrize("path", TEXTS, ids=names)
def test_a_test_that_is_named_exists(path: Path) -> None:
    named = set(re.findall(r"`(test_\w+)(?:\[[\w.-]+\])?`", path.read_text()))
    if named:
        defined = {
            name for each in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", each.read_text())
        }
        assert named <= defined, named - defined


def test_a_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES_MAX
    assert "./deploy/quickstart" in text and "./deploy/test" in text


def test_every_page_can_be_reached_from_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\(([^)]+\.md)\)", index))
