"""Whole lines out of what a process writes in pieces, and progress bars that stay bearable."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psa_store.launch.lines import LINE_BYTES_MAX, PROGRESS_S, LineCutter


@given(st.lists(st.binary(max_size=9).filter(lambda text: b"\r" not in text), max_size=20), st.data())
def test_lines_come_out_whole_however_they_were_cut(pieces: list[bytes], data: st.DataObject) -> None:
    text = b"".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    cutter, lines = LineCutter(), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        lines += cutter.feed(text[start:end], 0.0)
    lines += cutter.end()
    *whole, rest = text.split(b"\n")
    assert lines == whole + ([rest] if rest.strip() else [])


def test_a_progress_bar_is_shown_now_and_then_and_at_its_end() -> None:
    cutter = LineCutter()
    shown = [line for tick in range(1, 101) for line in cutter.feed(b"\r%3d%%" % tick, tick * PROGRESS_S / 20)]
    assert shown == [b"  1%", b" 21%", b" 41%", b" 61%", b" 81%"]
    assert cutter.feed(b"\r100% done\n", 100.0) == [b"100% done"]
    assert cutter.feed(b"next\r\n", 101.0) == [b"next"]


def test_a_state_that_was_shown_is_not_shown_again_at_its_end() -> None:
    cutter = LineCutter()
    assert cutter.feed(b"\r100%", 0.0) == [b"100%"]
    assert cutter.feed(b"\n", 1.0) == []
    assert cutter.feed(b"\r100%", 0.1) == []
    assert cutter.end() == [b"100%"]


def test_a_bar_that_is_wiped_leaves_the_next_line_clean() -> None:
    cutter = LineCutter()
    assert cutter.feed(b"\r 50%\r        \rhello\n", 0.0) == [b"hello"]


def test_the_memory_of_a_line_without_end_is_bounded() -> None:
    cutter = LineCutter()
    shown = cutter.feed(b"x" * (3 * LINE_BYTES_MAX), 0.0)
    assert all(len(line) == LINE_BYTES_MAX for line in shown) and len(shown) == 2
