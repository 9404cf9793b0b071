"""Redis takes commits of a term that is over."""

from __future__ import annotations

from psa_store.storage import library

_FENCES = (
    "if now > term then return {'fenced', now} end",
    "if now and now > args[1] and not (args[3] and now >= args[3]) then return {'fenced', now} end",
)
"""Of commits, and of seals."""


def plant() -> None:
    """Take the fences out of the functions that every process loads into Redis."""
    for fence in _FENCES:
        assert fence in library.LIBRARY
        library.LIBRARY = library.LIBRARY.replace(fence, "")
