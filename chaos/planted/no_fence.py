"""Redis takes commits of a term that is over."""

from __future__ import annotations

from typing import Any

from psa_store.storage.caller import Caller

_FENCES = (
    "if now > term then return {'fenced', now} end",
    "if now and now > args[1] and not (args[3] and now >= args[3]) then return {'fenced', now} end",
)
"""Of commits, and of seals."""


def plant() -> None:
    """Take the fences out of the functions that every process loads into Redis."""
    original = Caller.__init__

    def init(self: Caller, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        for fence in _FENCES:
            assert fence in self._library
            self._library = self._library.replace(fence, "")

    Caller.__init__ = init  # type: ignore[method-assign]
