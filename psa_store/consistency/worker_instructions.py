"""What a worker is to do in more than one mode: instructions that several of its machines give."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Compute:
    """Compute a rank's gradient of this step, and push it; in rounds, make a step with it."""

    step: int
    rank: int


@dataclass(frozen=True, slots=True)
class Await:
    """Have done with all versions below; have these owners bring this one."""

    version: int
    servers: Collection[str]


@dataclass(frozen=True, slots=True)
class AskClocks:
    """Ask these owners how many steps of each rank they have."""

    servers: Collection[str]


@dataclass(frozen=True, slots=True)
class Finish:
    """All is done up to here, a version, or on arrival a step of the held ranks: have it made durable."""

    last: int


@dataclass(frozen=True, slots=True)
class Listen:
    """Nothing can be done before an answer or a plan comes."""


LISTEN = Listen()
