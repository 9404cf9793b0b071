"""Nothing that another process wrote acts on a terminal, a page or a reader."""

from __future__ import annotations

import io
import sys
import unicodedata
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store import logs
from psa_store.logs import escaped
from psa_store.logs.escape import escaped_lines


@dataclass(frozen=True)
class Inner:
    name: str
    number: int = 1


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    texts: dict[str, str]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ä ✓ 名", "plain, ä ✓ 名"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\rb\nc\x9bd", "a\\x0db\\x0ac\\x9bd"),
        ("txt.\u202egnp", "txt.\\u202egnp"),
        ("\u2066x\u200b\u2028\ufeff\ud800", "\\u2066x\\u200b\\u2028\\ufeff\\ud800"),
    ],
)
def test_what_acts_is_written_as_a_code(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped(Outer((Inner(text),), {text: text})) == Outer((Inner(shown),), {shown: shown})


@given(st.text())
def test_no_character_of_control_or_direction_is_left(text: str) -> None:
    left = {unicodedata.category(each) for each in escaped(text)} & {"Cc", "Cs", "Zl", "Zp"}
    turning = {unicodedata.bidirectional(each) for each in escaped(text)} & {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI"}
    assert not left and not turning


def test_lines_of_our_own_stay_lines() -> None:
    assert escaped_lines("a\n\tb\x1bc\r") == "a\n\tb\\x1bc\\x0d"


@pytest.mark.parametrize("as_json", [False, True])
def test_log_and_messages_are_escaped(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("psa_store.logs.setup._setup", None)
    logs.configure("info", "test", as_json=as_json)
    logs.get_logger().warning("a member came", about="w\x1b]0;x\x07", all=["\u202e"])
    logs.complain("no job \x1b[2J")
    found = sys.stderr.getvalue()
    assert not {"\x1b", "\x07", "\u202e"} & set(found)
    assert found.count("\n") == 2 and "x1b]0;x" in found and "x1b[2J" in found
