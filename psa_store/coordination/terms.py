"""Terms: a number that only grows, by compare-and-set. Only this package may use it."""

from __future__ import annotations

from psa_store.coordination.znodes import Znode, Znodes
from psa_store.errors import DataIntegrity


def take(znodes: Znodes, path: str, at_least: int) -> int:
    """An attempt that was cut off may have used up a term: the next attempt takes a greater one."""
    while True:
        node = znodes.get(path)
        term = max(newest(node), at_least) + 1
        if node is None:
            written = znodes.create(path, str(term))
        else:
            written = znodes.set(path, str(term), node.version)
        if written is not None:
            return term


def newest(node: Znode | None) -> int:
    """The term that a node holds; 0 if there is none yet."""
    if node is None:
        return 0
    try:
        return int(node.text)
    except ValueError as error:
        raise DataIntegrity(f"{node.path} holds {node.text[:40]!r}, not a term") from error
