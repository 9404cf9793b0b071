"""Which parts of an arena a process has memory for, and where they lie in it: packed, one behind the other.

A worker needs the shards of its stages only. What is not theirs takes no memory then, and no addresses either. Parts
are whole pages, so that each can be mapped by itself; what lies within a page lies alike in both.

Pure: no I/O, no threads, no torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from psa_store.job.layout import PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Parts:
    """``ranges``: of bytes in the arena, in order and apart from each other. Build it with :func:`parts_of`."""

    ranges: tuple[tuple[int, int], ...]
    _places: tuple[int, ...]
    size_bytes: int

    def place(self, offset_bytes: int) -> int:
        """Where a byte of the arena lies in the memory."""
        index = bisect_right(self.ranges, (offset_bytes, self.ranges[-1][1])) - 1
        low, high = self.ranges[index]
        assert index >= 0 and low <= offset_bytes < high, f"byte {offset_bytes} of the arena is not in {self.ranges}"
        return self._places[index] + offset_bytes - low


def parts_of(ranges: Iterable[tuple[int, int]]) -> Parts:
    """The pages in which these ranges of bytes lie; at least one page."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        low, high = low // PAGE_BYTES * PAGE_BYTES, -(-high // PAGE_BYTES) * PAGE_BYTES
        if merged and low <= merged[-1][1]:
            low, high = merged[-1][0], max(high, merged.pop()[1])
        merged.append((low, high))
    merged = merged or [(0, PAGE_BYTES)]
    *places, size_bytes = accumulate((high - low for low, high in merged), initial=0)
    return Parts(tuple(merged), tuple(places), size_bytes)
