"""The tutorial is true: its script and its commands are run as they stand there, and their output is compared.

One thing is changed: the script makes fewer steps.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

import psa_store
from tests.harness import Run

TUTORIAL = Path(psa_store.__file__).parent / "docs" / "tutorial.md"
STEPS = 300
LEFT_OUT = "..."
DEADLINE_S = 900.0
_BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STAMP = re.compile(r"^(\[(worker|server)-\d\] )?([\d:.]+ \[\w+ *\] )?")
_VARIES = re.compile(r"\b[0-9a-f]{8}\b|\d|unix://|\w+=")
_FRAME = re.compile(r"[─━┏┓┳┡┩╇└┘┴]+")


def essence(line: str) -> str:
    """What is the same in every run: a row of a framed table, or the text up to the first number or address."""
    line = " ".join(_FRAME.sub("", _STAMP.sub("", line)).split())
    line = re.sub(r"^/.*/", "", line)  # the reader works in the folder of the files, the test does not
    return line if line.startswith("│") else _VARIES.split(line)[0].strip()


def essences(lines: Iterable[str]) -> list[str]:
    return [found for found in map(essence, lines) if found and found != LEFT_OUT]


def shows(run: Run, expected: list[str]) -> bool:
    """Whether the output has every expected line that is not left out, in this order."""
    lines = iter(essences(run.lines))
    return all(any(line.startswith(wanted) for line in lines) for wanted in essences(expected))


class Reader:
    """Does what the reader of the tutorial does, in two terminals."""

    def __init__(self, folder: Path) -> None:
        self._script = folder / "train.py"
        self._reports = folder
        self._env: Mapping[str, str] = {"PSA_HOME": str(folder / "home"), "COLUMNS": "120"}
        self._training: Run | None = None

    def save(self, code: str) -> None:
        assert "STEPS = 5_000\n" in code
        self._script.write_text(code.replace("STEPS = 5_000\n", f"STEPS = {STEPS}\n"))

    def type(self, command: str, expected: list[str]) -> None:
        words = shlex.split(command.replace("5000", str(STEPS)), comments=True)
        match words[:2]:
            case ["kill", "-9"]:
                self._kill(command.partition("# ")[2])
            case ["psa", "run"]:
                self._training = self._start(words)
                self.watch(expected)
            case ["psa", "status"]:
                end_s = time.monotonic() + DEADLINE_S
                while not shows(run := self._finished(words), expected):  # a reader looks again, too
                    assert time.monotonic() < end_s, run.output
            case _:
                run = self._finished(words)
                assert shows(run, expected), f"{expected} is not in:\n{run.output}"

    def watch(self, expected: list[str]) -> None:
        """Read on in the terminal that trains; the last step is its end."""
        assert self._training is not None
        for line in expected:
            if "step 5000:" in line:
                assert self._training.finish(DEADLINE_S) == 0, self._training.output
                assert f"step {STEPS}:" in self._training.output
            elif wanted := "".join(essences([line])):
                self._training.wait_for_line(lambda shown: essence(shown).startswith(wanted), DEADLINE_S)

    def _start(self, words: list[str]) -> Run:
        assert words[0] == "psa"
        words = [str(self._script) if word == "train.py" else word for word in words[1:]]
        return Run(words + (["--out", str(self._reports)] if words[0] == "report" else []), self._env)

    def _finished(self, words: list[str]) -> Run:
        run = self._start(words)
        assert run.finish(DEADLINE_S) == 0, run.output
        return run

    def _kill(self, what: str) -> None:
        assert self._training is not None
        found: dict[str, Any] = json.loads(self._finished(["psa", "status", "circle", "--json"]).output)
        match what:
            case "a worker":
                os.kill(found["workers"][0]["pid"], signal.SIGKILL)
            case "the controller":
                # In the tutorial it owns the parameters. Another server may, if it came first: then that one is meant.
                (pid,) = [each["pid"] for each in found["servers"] if each["shards"]]
                os.kill(pid, signal.SIGKILL)
            case "psa run":
                os.kill(self._training.process.pid, signal.SIGKILL)
                assert self._training.finish(DEADLINE_S) == -signal.SIGKILL
            case _:
                raise AssertionError(f"kill {what}?")


@pytest.mark.timeout(3600)
def test_the_tutorial_is_true(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    try:
        for language, text in _BLOCK.findall(TUTORIAL.read_text()):
            if language == "python":
                reader.save(text)
            elif language == "text":
                reader.watch(text.splitlines())
            else:
                command, *expected = text.splitlines()
                reader.type(command.removeprefix("$ "), expected)
        assert (tmp_path / "report-circle.png").is_file()
    finally:
        reader.type("psa down", [])
