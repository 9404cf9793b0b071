"""Terms: a number that only grows, by compare-and-set. Only this package may use it.

The number that a znode holds is believed as long as it can be: one that is none, or is far above everything that was
ever sealed, was not written by a controller. Then the next term leaves a gap, since some controllers may have taken
terms of which nothing else knows yet.
"""

from __future__ import annotations

from psa_store.coordination.documents import Reader
from psa_store.coordination.znodes import Znode, Znodes
from psa_store.errors import DataIntegrity
from psa_store.job.document import Damaged

GAP = 1000
"""More terms than can be taken and not yet sealed at one moment."""
_AHEAD_MAX = 1 << 32
"""A term that is further above all that are known is no term."""
_DIGITS_MAX = 16


def take(znodes: Znodes, path: str, at_least: int, reader: Reader) -> int:
    """An attempt that was cut off may have used up a term: the next attempt takes a greater one."""
    while True:
        node = znodes.get(path)
        found = newest(node, at_least, reader)
        term = (at_least + GAP if isinstance(found, Damaged) else max(found, at_least)) + 1
        if node is None:
            written = znodes.create(path, str(term))
        else:
            written = znodes.set(path, str(term), node.version)
        if written is not None:
            return term


def mend(znodes: Znodes, path: str, at_least: int, reader: Reader) -> None:
    """Write the term again if it is damaged, gone or lower than a published one. A watch wakes when it changes."""
    node = znodes.get(path, watch=True)
    found = newest(node, at_least, reader)
    if isinstance(found, Damaged) or found < at_least:
        text = str(at_least + GAP)
        if node is None:
            znodes.create(path, text)
        else:
            znodes.set(path, text, node.version)


def newest(node: Znode | None, known: int, reader: Reader) -> int | Damaged:
    """The term that a node holds; 0 if there is none yet. ``known``: one that was taken."""
    return 0 if node is None else reader.read(node, lambda text: _parsed(text, known))


def _parsed(text: str, known: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX and int(text) <= known + _AHEAD_MAX):
        raise DataIntegrity(f"{text[:40]!r} is no term")
    return int(text)
