"""What a server says to a gradient that a worker offers, in every mode."""

from __future__ import annotations

from enum import Enum, auto


class Offer(Enum):
    """What to do with a gradient that a worker offers."""

    NEW = auto()
    DUPLICATE = auto()
    """Have it already, or its step is over: take the bytes off the wire and drop them."""
    AHEAD = auto()
    """Its turn has not come here. In a synchronous job a correct worker cannot know of such a step."""
