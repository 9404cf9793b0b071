"""The members of a job: what a server or worker says of itself in its ephemeral znode, and what of it is believed.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from psa_store.cluster.plan import NO_WORKER, Plan
from psa_store.job.document import Damaged, from_text, to_text


class ProcessRole(StrEnum):
    """What a process is for."""

    SERVER = "server"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a job."""

    FORMAT: ClassVar[int] = 2

    id: str
    host: str
    pid: int
    address: str = ""
    """``host:port`` where a server listens; empty for workers."""
    local: str = ""
    """Name of the abstract Unix socket where a server listens for clients of the same host."""
    leaving: bool = False
    frozen_revision: int | None = None
    """The FREEZE, by its revision, for which this server stands still ..."""
    frozen_newest: int | None = None
    """... the newest version that some of its shards have ..."""
    frozen_version: int | None = None
    """... and the version that all of them have."""
    stopped_version: int | None = None
    """The version up to which it has stopped and committed, on a STOP."""
    reload_term: int | None = None
    """The term whose shards it could not load or has lost: it asks for a take-over."""

    def to_json(self) -> str:
        return to_text(self)


def member_from_json(text: str) -> Member:
    """Rebuild a member from :meth:`Member.to_json`; raises DataIntegrity if the text is not a member."""
    return from_text(Member, text, "a member's znode")


def believed(found: Mapping[str, Member | Damaged], plan: Plan | None) -> dict[str, Member]:
    """The members that count, by id, of those that were found.

    A znode that cannot be read may be a living member's: its owner will write it again. Until then a member that the
    plan names stays, as the plan knows it; any other is set aside, and gets nothing. A znode that no session keeps is
    no member.
    """
    named = {} if plan is None else {server.id: server for server in plan.servers}
    workers = set() if plan is None else set(plan.cells) - {NO_WORKER}
    counting = {}
    for name, each in found.items():
        if isinstance(each, Member):
            counting[name] = each
        elif each.kept and name in named:
            server = named[name]
            counting[name] = Member(name, server.host, 0, address=server.address, local=server.local)
        elif each.kept and name in workers:
            counting[name] = Member(name, "", 0)
    return counting
