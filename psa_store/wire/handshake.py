"""The proof of the key: both sides give it, before a frame is read. Pure: bytes in, bytes and a verdict out.

    the side that connects                             the side that accepts
    OPENING   format, role, job, a random number  -->
                                                  <--  ANSWER  a random number, proof of "accepts"
    PROOF     of "connects"                       -->
    the first frame                               -->

A proof is an HMAC, under the key, of the direction, the opening and the random number of the answer. So it is good for
this connection, job, role and direction alone:

* a replay of what was sent on another connection fails, since each side has chosen a new random number;
* a reflection fails, since the two directions have two names;
* a downgrade fails, since the opening with its format is part of what is proved, and a side that has a key says nothing
  to a side without one;
* a server that has not got the key is found out before the worker has proved anything to it.

A side without a key sends no opening. It begins with a frame, as :class:`FirstFrame` expects it. OPENING and ANSWER are
as long as the header of a frame, so that a neighbour that expects the other of the two reads it whole, and can say what
is missing. What is refused is refused with :class:`Rejected`, whose ``answer`` is the last word to the peer.

What follows the proof is not protected by it: within one host no process of another user can change it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from enum import IntEnum
from functools import cache
from typing import Final

from psa_store.errors import Refused
from psa_store.wire.documents import Refusal, encode
from psa_store.wire.frames import HEADER_BYTES, MAGIC, TEXT_BYTES_MAX, Header, Kind, Reason, unpack

FORMAT: Final = 1
NONCE_BYTES: Final = 32

_MAGIC = b"PSA\x03"
_OPENING = struct.Struct("<4sHH32s32s")
_ANSWER = struct.Struct("<4sHH32s32s")
_PROOF_BYTES = hashlib.sha256().digest_size
_NOTHING = bytes(32)
_TLS_ALERT = b"\x15\x03"

assert _OPENING.size == _ANSWER.size == HEADER_BYTES


class Role(IntEnum):
    """What the side that connects is; the side that accepts is a server."""

    WORKER = 1
    SERVER = 2
    OBSERVER = 3
    """It asks what the server does, and no more."""


class Cause(IntEnum):
    """Why an ANSWER refuses; NONE: it does not."""

    NONE = 0
    FORMAT = 1
    JOB = 2
    NO_KEY = 3


class Rejected(Refused):
    """The peer is not let in. ``answer``: what to send to it before the connection is closed."""

    def __init__(self, why: str, answer: bytes = b"") -> None:
        super().__init__(why)
        self.answer = answer


class Connecting:
    """The side that connects: send :attr:`opening`, then give what comes to :meth:`take` until :attr:`done`."""

    def __init__(self, key: bytes, job: str, role: Role, nonce: bytes) -> None:
        assert len(nonce) == NONCE_BYTES
        self.opening = _OPENING.pack(_MAGIC, FORMAT, role, nonce, _digest(job))
        self.done = False
        self._key = key
        self._come = b""

    @property
    def wanted(self) -> int:
        """How many bytes to read at most: none of a frame that follows."""
        return 0 if self.done else _ANSWER.size - len(self._come)

    def take(self, data: bytes) -> bytes:
        """Take bytes that have come, at most :attr:`wanted`; returns what to send.

        Raises:
            Rejected: the server has not got this key, has none, or speaks another protocol.
        """
        assert 0 < len(data) <= self.wanted
        self._come += data
        if self._come.startswith(_TLS_ALERT):
            raise Rejected("the server speaks TLS: set PSA_TLS_CERT, PSA_TLS_KEY and PSA_TLS_CA")
        if self.wanted:
            return b""
        magic, number, cause, nonce, proof = _ANSWER.unpack(self._come)
        if magic == MAGIC:
            raise Rejected("the server is of a release that knows no key: update it, or start this side without a key")
        if magic != _MAGIC:
            raise Rejected("what listens there is no server of psa_store")
        if cause == Cause.NO_KEY:
            raise Rejected("the server has no key: set PSA_KEY or PSA_KEY_FILE for it, to that of this side")
        if cause == Cause.JOB:
            raise Rejected("the server serves another job")
        if number != FORMAT or cause != Cause.NONE:
            raise Rejected(f"the server proves a key in format {number}, and this release in format {FORMAT}")
        if not hmac.compare_digest(proof, _proof(self._key, b"accepts", self.opening, nonce)):
            # What is sent proves nothing, and has the server say in its log what is wrong.
            raise Rejected(
                "the server has another key: PSA_KEY (or PSA_KEY_FILE) must be the same on both sides", _NOTHING
            )
        self.done = True
        return _proof(self._key, b"connects", self.opening, nonce)


class Accepting:
    """The side that accepts: give what comes to :meth:`take` until :attr:`done`."""

    def __init__(self, key: bytes, job: str, nonce: bytes) -> None:
        assert len(nonce) == NONCE_BYTES
        self.done = False
        self.role: Role | None = None
        self._key = key
        self._job = _digest(job)
        self._nonce = nonce
        self._come = b""
        self._opening = b""

    @property
    def wanted(self) -> int:
        """How many bytes to read at most: none of a frame that follows."""
        if self.done:
            return 0
        return (_PROOF_BYTES if self._opening else _OPENING.size) - len(self._come)

    def take(self, data: bytes) -> bytes:
        """Take bytes that have come, at most :attr:`wanted`; returns what to send.

        Raises:
            Rejected: the peer has not got this key, has none, is of another job, or speaks another protocol.
        """
        assert 0 < len(data) <= self.wanted
        self._come += data
        if self.wanted:
            return b""
        whole, self._come = self._come, b""
        return self._judge(whole) if self._opening else self._open(whole)

    def _open(self, opening: bytes) -> bytes:
        magic, number, role, _, job = _OPENING.unpack(opening)
        if magic == MAGIC:
            why = "this job has a key: set PSA_KEY or PSA_KEY_FILE to it"
            raise Rejected(f"a peer showed no key: {why}", refusal(why))
        if magic != _MAGIC:
            raise Rejected(f"not a psa frame: starts with {bytes(magic)!r}", refusal("not a psa frame"))
        if number != FORMAT:
            raise Rejected(f"a peer proves a key in format {number}, this release in {FORMAT}", _refuse(Cause.FORMAT))
        if not hmac.compare_digest(job, self._job):
            raise Rejected("a peer is of another job", _refuse(Cause.JOB))
        try:
            self.role = Role(role)
        except ValueError as error:
            raise Rejected(f"a peer has role {role}, which is not known here", _refuse(Cause.FORMAT)) from error
        self._opening = opening
        return _ANSWER.pack(
            _MAGIC, FORMAT, Cause.NONE, self._nonce, _proof(self._key, b"accepts", opening, self._nonce)
        )

    def _judge(self, proof: bytes) -> bytes:
        if not hmac.compare_digest(proof, _proof(self._key, b"connects", self._opening, self._nonce)):
            raise Rejected("a peer has another key: PSA_KEY (or PSA_KEY_FILE) must be the same on both sides")
        self.done = True
        return b""


class FirstFrame:
    """The side that accepts, without a key: HELLO or INSPECT comes first, and small. ``role`` is not said."""

    role: Role | None = None

    def __init__(self) -> None:
        self.header: Header | None = None
        self.payload = b""
        self._come = b""

    @property
    def done(self) -> bool:
        return self.header is not None and len(self.payload) == self.header.length

    @property
    def wanted(self) -> int:
        """How many bytes to read at most: none of the frame that follows."""
        if self.header is None:
            return HEADER_BYTES - len(self._come)
        return self.header.length - len(self.payload)

    def take(self, data: bytes) -> bytes:
        """Take bytes that have come, at most :attr:`wanted`; returns what to send: nothing.

        Raises:
            Rejected: the peer has a key, or begins with another frame, or one that announces too much.
        """
        assert 0 < len(data) <= self.wanted
        if self.header is not None:
            self.payload += data
            return b""
        self._come += data
        if len(self._come) < HEADER_BYTES:
            return b""
        if self._come.startswith(_MAGIC):
            raise Rejected("a peer has a key, and this server none: set PSA_KEY or PSA_KEY_FILE", _refuse(Cause.NO_KEY))
        try:
            header = unpack(self._come)
        except Refused as error:
            raise Rejected(str(error), refusal(str(error))) from error
        if header.kind not in (Kind.HELLO, Kind.INSPECT):
            why = f"{header.kind.name} before HELLO"
            raise Rejected(why, refusal(why))
        self.header = header
        return b""


def refusal(why: str) -> bytes:
    """Return the frame that says so to a peer that reads frames."""
    text = encode(Refusal(Kind.HELLO.name, why))
    assert len(text) <= TEXT_BYTES_MAX
    return Header(Kind.REFUSED, reason=Reason.WRONG, length=len(text)).pack() + text


def _refuse(cause: Cause) -> bytes:
    return _ANSWER.pack(_MAGIC, FORMAT, cause, _NOTHING, _NOTHING)


def _proof(key: bytes, direction: bytes, opening: bytes, nonce: bytes) -> bytes:
    """What is under the HMAC has one length for each direction, so no two of them are the same bytes."""
    return hmac.digest(key, b"psa_store " + direction + opening + nonce, "sha256")


@cache
def _digest(job: str) -> bytes:
    return hashlib.sha256(job.encode()).digest()
