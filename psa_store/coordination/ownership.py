"""Closing a whole ZooKeeper, one that is ours alone, to others: also what was open, and its root.

The ACL of a znode says which users may read and write it, and create below it. The root is closed as the last one: once
it is, everything is, and an attempt that was cut off before is made again.
"""

from __future__ import annotations

from contextlib import closing, suppress

from kazoo.exceptions import NoAuthError

from psa_store.coordination.access import as_access
from psa_store.coordination.session import Session
from psa_store.coordination.znodes import Znodes

_SESSION_TIMEOUT_S = 4.0
_OF_ZOOKEEPER = "/zookeeper"


def close_to_others(where: str, connect_timeout_s: float) -> None:
    """Let only the user of the address in; nothing happens if it is so already.

    Raises:
        DependencyUnreachable: ZooKeeper does not answer in time, or another user owns something there.
    """
    session = Session(
        as_access(where),
        session_timeout_s=_SESSION_TIMEOUT_S,
        connect_timeout_s=connect_timeout_s,
        wake=lambda: None,
    )
    with closing(session):
        session.start()
        session.run(_close_root)


def _close_root(znodes: Znodes) -> None:
    if not znodes.is_ours("/"):
        _close(znodes, "/")


def _close(znodes: Znodes, path: str) -> None:
    for name in znodes.children(path):
        _close(znodes, f"{path.rstrip('/')}/{name}")
    if path.startswith(_OF_ZOOKEEPER):
        with suppress(NoAuthError):  # all may read the ensemble's configuration, and none may change that
            znodes.own(path)
    else:
        znodes.own(path)
