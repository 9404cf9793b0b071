"""What cells of one step send each other, kept until the step is over: activations forward, their gradients backward.

Everything that is sent has an :class:`Address` and never changes: a cell that is computed once more sends the same, so
the first of two is kept and the second compared with it. A cell asks once for all that is for it in a step, and gets
what is here and what comes. So a worker that takes a dead one's cell begins with what was sent to that one.

A step can end although a cell still waits: its former holder has made its gradients, but sent nothing through here. So
all that wanted something are told when a step is over.

Pure: no I/O, no threads, no tensors, no clock.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from psa_store.cluster import Cell

Item = TypeVar("Item")
Reader = TypeVar("Reader", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Address:
    """The cell that it is for, and which micro-batch of which step. ``backward``: from the stage after, not before."""

    step: int
    cell: Cell
    microbatch: int
    backward: bool


class Relay(Generic[Item, Reader]):
    """Not thread-safe. ``Reader``: where an answer goes, such as a connection."""

    def __init__(self) -> None:
        self._items: dict[tuple[int, Cell], dict[Address, Item]] = {}
        self._readers: dict[tuple[int, Cell], list[Reader]] = {}
        self._version = 0

    def __len__(self) -> int:
        """How many items are kept."""
        return sum(map(len, self._items.values()))

    def put(self, address: Address, item: Item) -> tuple[list[Reader], Item | None]:
        """Keep what was sent; returns the readers that wait for it, and what had come to this address before."""
        if address.step < self._version:
            return [], None
        key = address.step, address.cell
        kept = self._items.setdefault(key, {})
        former = kept.setdefault(address, item)
        if former is not item:
            return [], former
        return list(self._readers.get(key, ())), None

    def want(self, step: int, cell: Cell, reader: Reader) -> list[tuple[Address, Item]]:
        """Note that a reader computes a cell; returns what is here for it. What comes later is for it, too."""
        if step < self._version:
            return []
        readers = self._readers.setdefault((step, cell), [])
        if reader not in readers:
            readers.append(reader)
        return list(self._items.get((step, cell), {}).items())

    def advance(self, version: int) -> list[Reader]:
        """A version is made: all steps below are over; returns the readers that wanted something of them."""
        self._version = version
        for key in [key for key in self._items if key[0] < version]:
            del self._items[key]
        over = [key for key in self._readers if key[0] < version]
        return list(dict.fromkeys(reader for key in over for reader in self._readers.pop(key)))

    def forget(self, reader: Reader) -> None:
        """A reader is gone."""
        for readers in self._readers.values():
            if reader in readers:
                readers.remove(reader)
