"""A server goes on serving when ZooKeeper may have declared it dead."""

from __future__ import annotations

from psa_store.server.event_loop import EventLoop


def plant() -> None:
    """Make servers believe that their lease never runs out."""
    EventLoop._has_lapsed = lambda self: False  # type: ignore[method-assign]
