"""Parts of an arena, packed: what a process needs has its place, and nothing else has room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.job.layout import PAGE_BYTES
from psa_store.job.parts import parts_of

RANGES = st.lists(st.tuples(st.integers(0, 40 * PAGE_BYTES), st.integers(1, 3 * PAGE_BYTES)), max_size=8)


@given(RANGES)
def test_every_page_that_is_needed_has_one_place_and_no_other_has_any(given_ranges: list[tuple[int, int]]) -> None:
    ranges = [(low, low + length) for low, length in given_ranges]
    parts = parts_of(ranges)
    pages = {page for low, high in ranges for page in range(low // PAGE_BYTES, -(-high // PAGE_BYTES))} or {0}
    places = [parts.place(page * PAGE_BYTES + 5) for page in sorted(pages)]
    assert places == [number * PAGE_BYTES + 5 for number in range(len(pages))]
    assert parts.size_bytes == len(pages) * PAGE_BYTES
    with pytest.raises(AssertionError, match="is not in"):
        parts.place((max(pages) + 1) * PAGE_BYTES)


@given(RANGES)
def test_what_is_side_by_side_stays_so(given_ranges: list[tuple[int, int]]) -> None:
    for low, length in given_ranges:
        parts = parts_of((start, start + size) for start, size in given_ranges)
        assert parts.place(low + length - 1) - parts.place(low) == length - 1
