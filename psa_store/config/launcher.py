"""What torchrun, and launchers that speak as it does, tell the processes that they start."""

from __future__ import annotations

import os

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def launched_world_size() -> int | None:
    """The number of processes that torchrun started with this one; None if it was not started so.

    WORLD_SIZE alone may be a leftover of something else, so all of torchrun's variables must be there.
    """
    if any(name not in os.environ for name in _VARIABLES):
        return None
    size = os.environ["WORLD_SIZE"]
    return int(size) if size.isdecimal() and int(size) > 0 else None
