"""The frames of the protocol: a fixed header of 64 bytes, then ``length`` raw bytes.

    worker -> server            server -> worker            server -> server
    HELLO   who I am            WELCOME  who you reached    HELLO, WELCOME
    PUSH    gradient of (step, rank, shard)                 NORM  squared norms of reduced shards
    PULL    shard at >= step    PARAMS   shard at step
    FINISH  make step durable   DURABLE  step is durable
    INSPECT                     REPORT   what the server does, as JSON
                                REFUSED  which frame, and why

PUSH is answered only if it is refused: PARAMS of a later version is its acknowledgement.

Pure: no socket. :mod:`psa_store.wire.connection` moves the bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from psa_store.errors import Refused

PROTOCOL = 1
MAGIC = b"PSA\x01"
_HEADER = struct.Struct("<4sBBHIIQQqQQ8x")
HEADER_BYTES = _HEADER.size
PAYLOAD_BYTES_MAX = 1 << 32
TEXT_BYTES_MAX = 1 << 20
"""Limit for payloads that are JSON, so that a lying length cannot make a peer allocate gigabytes."""


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    PUSH = 3
    PULL = 4
    PARAMS = 5
    NORM = 6
    FINISH = 7
    DURABLE = 8
    INSPECT = 9
    REPORT = 10
    REFUSED = 11


class Reason(IntEnum):
    """Why a frame was refused; the receiver of REFUSED decides by it."""

    NONE = 0
    STALE = 1  # the epoch is over: read the plan
    NOT_HOLDER = 2  # the plan gives this rank to another worker: read the plan
    NOT_OWNER = 3  # this server does not lead the shard: read the plan
    NONFINITE = 4  # the gradient holds NaN or Inf: the text names the parameter
    AGAIN = 5  # the push was dropped through no fault of its own: compute it again
    WRONG = 6  # the frame contradicts the layout or the protocol: a bug or a stranger


@dataclass(frozen=True, slots=True)
class Header:
    """``step``: the step of a gradient, or the version of parameters. ``reason`` is set in REFUSED only."""

    kind: Kind
    epoch: int = 0
    revision: int = 0
    step: int = 0
    rank: int = 0
    shard: int = 0
    length: int = 0
    reason: Reason = Reason.NONE

    def pack(self) -> bytes:
        return _HEADER.pack(
            MAGIC,
            self.kind,
            0,
            self.reason,
            self.rank,
            self.shard,
            self.epoch,
            self.revision,
            self.step,
            self.length,
            0,
        )


def unpack(data: bytes | bytearray | memoryview) -> Header:
    """Decode a header.

    Raises:
        Refused: wrong magic, unknown kind, or a length beyond the limits; the connection cannot be used further.
    """
    magic, kind, _flags, reason, rank, shard, epoch, revision, step, length, _ = _HEADER.unpack(data)
    if magic != MAGIC:
        raise Refused(f"not a psa frame: starts with {bytes(magic)!r}")
    try:
        header = Header(Kind(kind), epoch, revision, step, rank, shard, length, Reason(reason))
    except ValueError as error:
        raise Refused(f"frame of another protocol version: {error}") from error
    limit = PAYLOAD_BYTES_MAX if header.kind in (Kind.PUSH, Kind.PARAMS) else TEXT_BYTES_MAX
    if length > limit:
        raise Refused(f"{header.kind.name} announces {length} bytes; at most {limit} are possible")
    return header


def encode_text(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def decode_text(payload: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Decode a JSON payload; raises Refused if it is not an object."""
    try:
        document = json.loads(bytes(payload))
    except ValueError as error:
        raise Refused(f"unreadable text frame: {error}") from error
    if not isinstance(document, dict):
        raise Refused("unreadable text frame: not an object")
    return document
