"""What the parts of a server tell each other: control and committer write to the engine, the engine to control."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from psa_store.plan import Cut, Plan
from psa_store.server.lead import Lead
from psa_store.storage import Manifest
from psa_store.wire import SharedMemory

# --- to the engine


@dataclass(frozen=True, slots=True)
class Release:
    """The epoch is over: let go of all shards. ``held`` is answered with the leads, for reuse in the next epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Serve these shards under this plan. ``memory``: where their parameters are published; ``peers``: connections to
    the other servers of the plan."""

    member: str
    """Our name in this plan: it is another after our session has expired."""
    plan: Plan
    leads: Mapping[int, Lead]
    memory: SharedMemory
    peers: Mapping[str, socket.socket]


@dataclass(frozen=True, slots=True)
class Revise:
    """The same epoch, but other ranks or another phase."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Join:
    """A new connection to a peer whose old one broke."""

    server: str
    sock: socket.socket


@dataclass(frozen=True, slots=True)
class Measured:
    """The squared norms of some shards' mean gradients."""

    epoch: int
    squared_norms: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Updated:
    """One shard stands at ``version``; not all may."""

    epoch: int
    shard: int
    version: int


@dataclass(frozen=True, slots=True)
class Applied:
    """The pool has made all updates that it was asked for."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Moved:
    """The pool has copied all parameters to other memory."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Snapped:
    """The pool has copied the state of ``version`` of some shards, or all, for the committer."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Committed:
    """All shards of this server are durable at ``version``. ``pinned``: for this checkpoint they are kept."""

    epoch: int
    version: int
    manifests: Mapping[int, Manifest]
    pinned: Cut | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """This server may or can not lead any more: a commit was fenced, or a pool thread failed."""

    epoch: int
    why: str


@dataclass(frozen=True, slots=True)
class Quit:
    """End the event loop."""


ToEngine = Release | Serve | Revise | Join | Measured | Updated | Applied | Moved | Snapped | Committed | Lost | Quit

# --- to control


@dataclass(frozen=True, slots=True)
class Released:
    """The engine holds nothing of an old epoch any more. ``leads`` stand at ``version`` and are control's now."""

    version: int
    leads: Mapping[int, Lead]


@dataclass(frozen=True, slots=True)
class Frozen:
    """Standing still at ``version``, for the FREEZE with this mark; some shards may be at ``newest`` already."""

    mark: int
    version: int
    newest: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """Standing still at ``version``, which is committed."""

    version: int


@dataclass(frozen=True, slots=True)
class CannotServe:
    """The shards of this epoch are lost to this server: it asks for a take-over."""

    epoch: int
    why: str


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The connection to a peer broke; control makes a new one while the plan still names it."""

    epoch: int
    server: str


@dataclass(frozen=True, slots=True)
class Pinned:
    """What this server leads is kept at ``version`` for a checkpoint."""

    epoch: int
    cut: Cut
    version: int


@dataclass(frozen=True, slots=True)
class Missed:
    """This server is beyond the version of a checkpoint: it was told too late."""

    epoch: int
    cut: Cut


ToControl = Released | Frozen | Stopped | CannotServe | PeerGone | Pinned | Missed
