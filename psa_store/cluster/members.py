"""The members of a job: what a server or worker says of itself in its ephemeral znode. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from psa_store.job.document import from_text, to_text


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
