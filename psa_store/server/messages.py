"""What the parts of a server tell each other: control and committer write to the event loop, the event loop to
control."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from psa_store.cluster import Cut, Plan
from psa_store.server.shard import OwnedShard
from psa_store.storage import Manifest
from psa_store.wire import SharedMemory

# --- to the event loop


@dataclass(frozen=True, slots=True)
class Release:
    """The term is over: let go of all shards. ``held`` is answered with the owns, for reuse in the next term."""

    term: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Serve these shards under this plan. ``memory``: where their parameters are published; ``peers``: connections to
    the other servers of the plan."""

    member: str
    """Our name in this plan: it is another after our session has expired."""
    plan: Plan
    owned_shards: Mapping[int, OwnedShard]
    memory: SharedMemory
    peers: Mapping[str, socket.socket]


@dataclass(frozen=True, slots=True)
class Revise:
    """The same term, but other ranks or another phase."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Join:
    """A new connection to a peer whose old one broke."""

    server: str
    sock: socket.socket


@dataclass(frozen=True, slots=True)
class Measured:
    """The squared norms of some shards' mean gradients."""

    term: int
    squared_norms: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Updated:
    """One shard stands at ``version``; not all may."""

    term: int
    shard: int
    version: int


@dataclass(frozen=True, slots=True)
class Applied:
    """The pool has made all updates that it was asked for."""

    term: int


@dataclass(frozen=True, slots=True)
class Moved:
    """The pool has copied all parameters to other memory."""

    term: int


@dataclass(frozen=True, slots=True)
class Snapped:
    """The pool has copied the state of ``version`` of some shards, or all, for the committer."""

    term: int
    version: int


@dataclass(frozen=True, slots=True)
class Committed:
    """All shards of this server are durable at ``version``. ``pinned``: for this checkpoint they are kept."""

    term: int
    version: int
    manifests: Mapping[int, Manifest]
    pinned: Cut | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """This server may or can not own any more: a commit was fenced, or a pool thread failed."""

    term: int
    why: str


@dataclass(frozen=True, slots=True)
class Quit:
    """End the event loop."""


ToEventLoop = Release | Serve | Revise | Join | Measured | Updated | Applied | Moved | Snapped | Committed | Lost | Quit

# --- to control


@dataclass(frozen=True, slots=True)
class Released:
    """The event loop holds nothing of an old term any more. ``owned_shards`` stand at ``version`` and are control's
    now."""

    version: int
    owned_shards: Mapping[int, OwnedShard]


@dataclass(frozen=True, slots=True)
class Frozen:
    """Standing still at ``version``, for the FREEZE of this revision; some shards may be at ``newest`` already."""

    revision: int
    version: int
    newest: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """Standing still at ``version``, which is committed."""

    version: int


@dataclass(frozen=True, slots=True)
class CannotServe:
    """The shards of this term are lost to this server: it asks for a take-over."""

    term: int
    why: str


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The connection to a peer broke; control makes a new one while the plan still names it."""

    term: int
    server: str


@dataclass(frozen=True, slots=True)
class Pinned:
    """What this server owns is kept at ``version`` for a checkpoint."""

    term: int
    cut: Cut
    version: int


@dataclass(frozen=True, slots=True)
class Missed:
    """This server is beyond the version of a checkpoint: it was told too late."""

    term: int
    cut: Cut


ToPlanFollower = Released | Frozen | Stopped | CannotServe | PeerGone | Pinned | Missed
