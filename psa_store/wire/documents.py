"""The payloads that are text: documents, each with a format number, one reader and one writer.

A reader ignores fields that it does not know; another format, or another protocol, is refused in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from psa_store.errors import DataIntegrity, Refused
from psa_store.job.document import Document, from_text, to_text
from psa_store.wire.frames import PROTOCOL


@dataclass(frozen=True, slots=True)
class Hello:
    """HELLO: which process connects, and to what. ``member``: its name in the job."""

    FORMAT: ClassVar[int] = PROTOCOL

    job: str
    layout: str
    """Fingerprint of the job's layout."""
    member: str
    by_reference: bool | None = None
    """Whether a worker shares memory with servers of its host; None in a server."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """WELCOME: which server was reached."""

    FORMAT: ClassVar[int] = 1

    server: str


@dataclass(frozen=True, slots=True)
class Report:
    """REPORT: what a server does now. ``version`` and ``committed`` are None where there is no term to serve."""

    FORMAT: ClassVar[int] = 1

    server: str
    term: int | None
    stage: str
    version: int | None
    committed: int | None
    shards: int
    untouched: int | None = None
    """The first step of which the shards here have nothing that a rank pushed."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """REFUSED: which kind of frame, and why."""

    FORMAT: ClassVar[int] = 1

    kind: str
    why: str


D = TypeVar("D", bound=Document)


def encode(document: Document) -> bytes:
    """Write a payload."""
    return to_text(document).encode()


def decode(kind: type[D], payload: bytes | bytearray | memoryview) -> D:
    """Read a payload back; raises Refused if it is not such a document."""
    try:
        return from_text(kind, bytes(payload), kind.__name__.upper())
    except DataIntegrity as error:
        raise Refused(f"unreadable text frame: {error}") from error
