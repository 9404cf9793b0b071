"""Where the text of a znode becomes a document, or is set aside: the one place that decides what is believed.

Any process that reaches ZooKeeper may have written a znode: a person, a script, a newer release. What cannot be read is
:class:`Damaged`, a value like any other: it is counted, and written again by a process that knows what it should be.
Only this package may use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from psa_store.coordination.znodes import Znode
from psa_store.errors import DataIntegrity
from psa_store.job.document import Damaged
from psa_store.logs import Account

T = TypeVar("T")


class Reader:
    """Reads znodes of one job, and keeps account of what it set aside. Thread-safe."""

    def __init__(self) -> None:
        self.account = Account[Damaged]("a znode")

    def read(self, node: Znode, parse: Callable[[str], T], *, ephemeral: bool = False) -> T | Damaged:
        """What a znode says. ``ephemeral``: only a session that lives may say it."""
        try:
            if ephemeral and not node.owner:
                raise DataIntegrity("no process keeps it: it is not ephemeral. Delete it")
            return parse(node.text)
        except DataIntegrity as error:
            return self.set_aside(node, str(error))

    def set_aside(self, node: Znode, why: str) -> Damaged:
        """Count and log a znode that cannot be what it should be."""
        damaged = Damaged(node.path, why, node.version, kept=bool(node.owner))
        self.account.note(damaged, (node.path, node.version, node.modified_s), where=damaged.where, why=damaged.why)
        return damaged
