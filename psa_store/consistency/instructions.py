"""What the machines of this room are told, and what they answer: typed events in, typed instructions out.

A machine takes instructions to be under way from the moment at which it gives them, and gives no other for the same
shards until the event comes that ends them. It gives them in the order in which they must be carried out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from psa_store.cluster import Cut, Plan


class Offer(Enum):
    """What to do with a gradient that a worker offers."""

    NEW = auto()
    DUPLICATE = auto()
    """It is here already, or its step is over: take the bytes off the wire and drop them."""
    AHEAD = auto()
    """Its turn has not come here. In a synchronous job a correct worker cannot know of such a step."""


class Stage(Enum):
    """What is being done to the shards of a server."""

    COLLECTING = auto()
    MOVING = auto()
    """Parameters are being copied to other memory: a worker may still read the present version in the old."""
    APPLYING = auto()
    SNAPPING = auto()
    """The state is being copied for a commit."""


class Memory(Enum):
    """Which workers still read the present version where the next one will be written."""

    FREE = auto()
    READ_BY_HOLDERS = auto()
    """Workers that hold a rank: they will be done soon, or lose the rank, or die."""
    READ_BY_OTHERS = auto()
    """Workers that hold none, and may read for as long as they like: the memory is left to them."""


@dataclass(frozen=True, slots=True)
class Push:
    """The gradient of one rank for one shard, whole."""

    shard: int
    rank: int
    step: int
    finite: bool = True


# --- events


@dataclass(frozen=True, slots=True)
class Revised:
    """The plan of this term, or a newer revision of it."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Measured:
    """The squared norms of some shards' mean gradients."""

    squared_norms: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class NormsTold:
    """What another server says of its shards in this step."""

    step: int
    squared_norms: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Applied:
    """The update that was asked for is made."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The parameters lie in other memory now."""


@dataclass(frozen=True, slots=True)
class Copied:
    """The state of the shards that were to be copied is copied."""


@dataclass(frozen=True, slots=True)
class CopyDelayed:
    """It cannot be copied yet: the copies of the last commit are still being written."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A version of all shards here is durable."""

    version: int


@dataclass(frozen=True, slots=True)
class RankCut:
    """A worker says with which push of a rank the checkpoint of this barrier ends."""

    barrier: int
    rank: int
    clock: int


Event = Revised | Measured | NormsTold | Applied | Moved | Copied | CopyDelayed | Committed | RankCut

# --- instructions


@dataclass(frozen=True, slots=True)
class Measure:
    """Compute the norms of these shards' gradients, and say :class:`Measured`."""

    shards: Sequence[int]


@dataclass(frozen=True, slots=True)
class TellNorms:
    """Tell them to the other servers."""

    step: int
    squared_norms: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Move:
    """Leave the memory to the workers that read it: say :class:`Moved`."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Update all shards by what was pushed for ``step``. ``squared_norms``: of all shards of the job, in order."""

    step: int
    squared_norms: Sequence[float]


@dataclass(frozen=True, slots=True)
class ApplyPushes:
    """Update some shards, each by one push."""

    pushes: Sequence[Push]


@dataclass(frozen=True, slots=True)
class Skip:
    """Forget what was pushed for ``step``: it is not finite."""

    step: int


@dataclass(frozen=True, slots=True)
class Follow:
    """Be at ``version``, to which nothing that this server owns had to change."""

    version: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the state of these shards, which stand at ``version``: say :class:`Copied` or :class:`CopyDelayed`."""

    version: int
    shards: Sequence[int]


@dataclass(frozen=True, slots=True)
class Commit:
    """Make what was copied durable as ``version``: say :class:`Committed`. ``pin``: keep it for this checkpoint."""

    version: int
    pin: Cut | None


@dataclass(frozen=True, slots=True)
class Hurry:
    """Write the present commit at full speed: it is waited for."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """Tell the controller: all shards stand still, for the FREEZE of this revision.

    ``version``: what all of them have; ``newest``: what some have.
    """

    revision: int
    version: int
    newest: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """Tell the controller: all shards stand still at ``version``, which is committed."""

    version: int


@dataclass(frozen=True, slots=True)
class Pinned:
    """Tell the controller: what is owned here is kept at ``version`` for a checkpoint."""

    term: int
    cut: Cut
    version: int


@dataclass(frozen=True, slots=True)
class Missed:
    """Tell the controller: this server is beyond the version of a checkpoint. It was told too late."""

    term: int
    cut: Cut


Report = Frozen | Stopped | Pinned | Missed
Instruction = Measure | TellNorms | Move | Apply | ApplyPushes | Skip | Follow | Copy | Commit | Hurry | Report
