"""What the threads of a server tell each other: the plan follower, the committer and the threads of arithmetic write to
the event loop, the event loop to the plan follower."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from psa_store.cluster import Cut, Plan
from psa_store.consistency.instructions import Applied, Copied, Measured, Moved, Report
from psa_store.optim.history import OptimizerHistory
from psa_store.server.shard import OwnedShard
from psa_store.storage import Manifest
from psa_store.wire import SharedMemory

# --- to the event loop


@dataclass(frozen=True, slots=True)
class Release:
    """The term is over: let go of all shards, and answer :class:`Released`."""

    term: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Serve these shards under this plan. ``memory``: where their parameters are published; ``history``: the
    optimizer of each step; ``peers``: connections to the other servers of the plan."""

    member: str
    """The name of this server in the plan: it is another after its session has expired."""
    plan: Plan
    owned_shards: Mapping[int, OwnedShard]
    memory: SharedMemory
    history: OptimizerHistory
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
class Updated:
    """One shard stands at ``version``; not all may."""

    term: int
    shard: int
    version: int


@dataclass(frozen=True, slots=True)
class Done:
    """The threads of arithmetic have done what they were asked for."""

    term: int
    event: Measured | Applied | Moved | Copied


@dataclass(frozen=True, slots=True)
class Committed:
    """All shards of this server are durable at ``version``. ``pinned``: for this checkpoint they are kept."""

    term: int
    version: int
    manifests: Mapping[int, Manifest]
    pinned: Cut | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """This server may or can not own any more: a commit was fenced, or a thread of arithmetic failed."""

    term: int
    why: str


@dataclass(frozen=True, slots=True)
class Quit:
    """End the event loop."""


ToEventLoop = Release | Serve | Revise | Join | Done | Updated | Committed | Lost | Quit

# --- to the plan follower


@dataclass(frozen=True, slots=True)
class Released:
    """The event loop holds nothing of an old term any more.

    ``owned_shards`` stand at ``version``, and the plan follower may use them again; None: there are none.
    """

    version: int | None
    owned_shards: Mapping[int, OwnedShard]


@dataclass(frozen=True, slots=True)
class CannotServe:
    """The shards of this term are lost to this server: it asks for a take-over."""

    term: int
    why: str


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The connection to another server broke; a new one is made while the plan still names it."""

    term: int
    server: str


ToPlanFollower = Released | CannotServe | PeerGone | Report
