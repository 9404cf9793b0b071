"""Epochs: a number that only grows, by compare-and-set. Only this package may use it."""

from __future__ import annotations

from psa_store.coordination.requests import Requests, Znode
from psa_store.errors import DataIntegrity


def take(requests: Requests, path: str, at_least: int) -> int:
    """An attempt that was cut off may have used up an epoch: the next attempt takes a greater one."""
    while True:
        node = requests.get(path)
        epoch = max(newest(node), at_least) + 1
        if node is None:
            written = requests.create(path, str(epoch))
        else:
            written = requests.set(path, str(epoch), node.version)
        if written is not None:
            return epoch


def newest(node: Znode | None) -> int:
    """The epoch that a node holds; 0 if there is none yet."""
    if node is None:
        return 0
    try:
        return int(node.text)
    except ValueError as error:
        raise DataIntegrity(f"{node.path} holds {node.text[:40]!r}, not an epoch") from error
