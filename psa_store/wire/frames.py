"""The frames of the protocol: a fixed header of 72 bytes, then ``length`` raw bytes.

    worker -> server            server -> worker            server -> server
    HELLO   the worker's name   WELCOME  the server's name  HELLO, WELCOME
    SHARE   memory for gradients, its descriptor passed     NORM  squared norms of reduced shards
    PUSH    gradient of (step, rank, shards)
    PULL    shard at >= step    PARAMS   shard or its average at step, or STATE of a rank there
    AWAIT   all, at >= step     PARAMS ..., then VERSION    all of it is with you
    FINISH  make step durable   DURABLE  step is durable
    CLOCKS                      CLOCKS   pushes of each rank that count now, and that are durable (on arrival)
    CUT     a checkpoint ends with the first pushes of a rank: so many (on arrival)
    RELAY   what a cell sends   RELAY    the same, to the cell that it is for
    WANT    all that is for a cell  WANT     all steps below are over: nothing comes of them any more
    INSPECT                     REPORT   what the server does
                                REFUSED  which frame, and why

PUSH is answered only if it is refused: VERSION of a later step is its acknowledgement.

A tensor travels in one of two ways. By value: its bytes follow the header. By reference, between processes of one
host that have agreed on it in HELLO: the header tells where in shared memory it lies. A worker's PUSH then names the
``memory`` that it gave with SHARE; a server's VERSION names the ``memory`` (by its generation) in which its
parameters are visible, and passes the descriptor when it is new to the connection. Buffers always travel by value.

In a job whose pushes are applied on arrival AWAIT names a step of a rank, which VERSION repeats, and CLOCKS is the
acknowledgement of PUSH: a server says it when asked, and after each commit. In other jobs it is said when asked, once
all that came before on the connection has been taken or refused.

In a job with stages RELAY names the (step, rank, stage, micro-batch) that it is for: activations of the stage before,
or, with BACKWARD, gradients of them from the stage after. Its payload begins with a description of its tensors; by
reference, their bytes lie in memory whose descriptor is passed. AWAIT names the stages whose shards are wanted.

AWAIT also says that the worker reads no version below ``step`` any more. Until then a server leaves the memory that it
has shown to a worker as it is.

Pure: no socket. :mod:`psa_store.wire.connection` moves the bytes.
"""

from __future__ import annotations

import struct
from enum import STRICT, IntEnum, IntFlag
from typing import NamedTuple

from psa_store.errors import Refused

PROTOCOL = 8
MAGIC = b"PSA\x02"
_HEADER = struct.Struct("<4sBBHIIQQqQIIIfHHI")
HEADER_BYTES = _HEADER.size
RELAY_HEAD = struct.Struct("<IQ")
"""What the payload of a RELAY begins with: the length of its description, and of all tensors, in bytes."""
PAYLOAD_BYTES_MAX = 1 << 32
TEXT_BYTES_MAX = 1 << 20
HELLO_BYTES_MAX = 1 << 10
"""Limits for numbers and documents (see ``wire.documents``): a lying length must not make a peer allocate gigabytes.

That of HELLO is what one peer can have us keep of which nothing is known but that it has the key, if there is one.
"""


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
    SHARE = 12
    AWAIT = 13
    VERSION = 14
    CLOCKS = 15
    STATE = 16
    CUT = 17
    RELAY = 18
    WANT = 19


_BARE = frozenset(
    {Kind.SHARE, Kind.PULL, Kind.AWAIT, Kind.VERSION, Kind.FINISH, Kind.DURABLE, Kind.INSPECT, Kind.CUT, Kind.WANT}
)
"""Kinds whose header says everything."""
WITH_DESCRIPTOR = frozenset({Kind.SHARE, Kind.VERSION, Kind.RELAY})
"""Kinds that may come with a descriptor."""


class Flag(IntFlag, boundary=STRICT):
    NONE = 0
    BY_REFERENCE = 1
    NONFINITE = 2
    """The gradient holds NaN or Inf; the job skips such steps."""
    STATE = 4
    """PULL: not the parameters, but the state of a rank. PUSH: that comes behind the gradient, though none is due."""
    MOVEMENT = 8
    """PARAMS: what the version adds to the one before, encoded as the job's gradients are."""
    ABSENT = 16
    """PUSH: at its end is a byte for each piece of its shards, 1 where a tensor got no gradient."""
    AVERAGE = 32
    """PULL, PARAMS: not the parameters of a shard, but their average over the steps."""
    BACKWARD = 64
    """RELAY: gradients for a stage from the one after it, not activations from the one before."""


class Reason(IntEnum):
    """Why a frame was refused; the receiver of REFUSED decides by it."""

    NONE = 0
    STALE = 1  # the term is over: read the plan
    NOT_HOLDER = 2  # the plan gives this rank to another worker: read the plan
    NOT_OWNER = 3  # this server does not own the shard: read the plan
    WRONG = 4  # the frame contradicts the layout or the protocol: a bug or a stranger


class Header(NamedTuple):
    """``step``: the step of a gradient, or the version of parameters. ``reason`` is set in REFUSED only.

    ``shards``: how many shards a PUSH by reference is about, ``shard`` being the first. ``memory``: the number of
    shared memory, in SHARE, PUSH and VERSION. ``barrier``: that of the checkpoint, in CUT. ``weight``: of a PUSH in the
    mean over ranks, as float32. ``stage`` and ``microbatch``: which a RELAY is for, and the stage of a WANT.
    ``stages``: bit k says that an AWAIT is for the shards of stage k.
    """

    kind: Kind
    term: int = 0
    revision: int = 0
    step: int = 0
    rank: int = 0
    shard: int = 0
    length: int = 0
    reason: Reason = Reason.NONE
    flags: Flag = Flag.NONE
    memory: int = 0
    shards: int = 1
    barrier: int = 0
    weight: float = 1.0
    stage: int = 0
    microbatch: int = 0
    stages: int = 1

    def pack(self) -> bytes:
        """Encode: the fields in the order in which machines of any byte order read them."""
        kind, term, revision, step, rank, shard, length, reason, flags, memory, shards, barrier, weight = self[:13]
        return _HEADER.pack(
            MAGIC,
            kind,
            flags,
            reason,
            rank,
            shard,
            term,
            revision,
            step,
            length,
            memory,
            shards,
            barrier,
            weight,
            *self[13:],
        )


def unpack(data: bytes | bytearray | memoryview) -> Header:
    """Decode a header.

    Raises:
        Refused: wrong magic, unknown kind, or a length beyond the limits; the connection cannot be used further.
    """
    fields = _HEADER.unpack(data)
    magic, number, flags, reason, rank, shard, term, revision, step, length, memory, shards, barrier, weight = fields[
        :14
    ]
    if magic != MAGIC:
        raise Refused(f"not a psa frame: starts with {bytes(magic)!r}")
    try:
        kind, flag, why = _KINDS[number], _FLAGS[flags], _REASONS[reason]
    except KeyError as error:
        raise Refused(f"frame of another protocol version: {error} is not known here") from error
    if length:
        limit = _LENGTH_MAX[kind]
        if flag & Flag.BY_REFERENCE:
            limit = TEXT_BYTES_MAX if flag & Flag.ABSENT or kind is Kind.RELAY else 0
        if length > limit:
            raise Refused(f"{kind.name} announces {length} bytes; at most {limit} are possible")
    return Header(
        kind, term, revision, step, rank, shard, length, why, flag, memory, shards, barrier, weight, *fields[14:]
    )


# Each frame is decoded while a step waits for it, and a table is faster than the call of an enum.
_KINDS = {each.value: each for each in Kind}
_REASONS = {each.value: each for each in Reason}
_FLAGS = {value: Flag(value) for value in range(1 << len(Flag))}
_LARGE = frozenset({Kind.PUSH, Kind.PARAMS, Kind.STATE, Kind.RELAY})
_LENGTH_MAX = (
    dict.fromkeys(Kind, TEXT_BYTES_MAX)
    | dict.fromkeys(_BARE, 0)
    | dict.fromkeys(_LARGE, PAYLOAD_BYTES_MAX)
    | {Kind.HELLO: HELLO_BYTES_MAX}
)
