"""What a process needs to be let in by others, and to let them in: the key, the job that it is proved for, TLS."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass, field

from psa_store.config import Settings, cluster_key
from psa_store.errors import Disconnected, Unproved
from psa_store.wire.handshake import NONCE_BYTES, Accepting, Connecting, FirstFrame, Rejected, Role

_CREDENTIALS = struct.Struct("3i")
_BLOCKS_S = 0.001
"""Not 0: that would mean not to wait, and another kind of error."""


@dataclass(frozen=True, slots=True)
class Door:
    """``key`` is None where every process of this machine's user, or of its loopback, may enter."""

    job: str
    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def from_settings(cls, settings: Settings, job: str) -> Door:
        """Read the key; raises UsageError if it cannot be used."""
        return cls(job, cluster_key(settings))

    def accepting(self) -> Accepting | FirstFrame:
        """How a connection begins that another process has made."""
        return FirstFrame() if self.key is None else Accepting(self.key, self.job, secrets.token_bytes(NONCE_BYTES))

    def enter(self, sock: socket.socket, role: Role, end_s: float) -> None:
        """Have the server prove the key and prove it to the server, if there is one; ``end_s`` is a monotonic time.

        Raises:
            Unproved: one of the two has not got the key of the other.
            Disconnected: the server does not answer in time, or closes the connection.
        """
        if self.key is None:
            return
        proof = Connecting(self.key, self.job, role, secrets.token_bytes(NONCE_BYTES))
        try:
            sock.settimeout(max(_BLOCKS_S, end_s - time.monotonic()))
            sock.sendall(proof.opening)
            while not proof.done:
                sock.settimeout(max(_BLOCKS_S, end_s - time.monotonic()))
                data = sock.recv(proof.wanted)
                if not data:
                    raise Disconnected("the server closed the connection before the key was proved")
                answer = proof.take(data)
                if answer:
                    sock.sendall(answer)
        except Rejected as error:
            _say_last(sock, error.answer)
            raise Unproved(str(error)) from error
        except OSError as error:
            raise Disconnected(f"lost the server before the key was proved: {error}") from error


def is_own(sock: socket.socket) -> bool:
    """Whether the other end of a Unix socket belongs to the user of this process."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(uid == os.geteuid())


def _say_last(sock: socket.socket, answer: bytes) -> None:
    try:
        sock.sendall(answer)
    except OSError:
        pass  # it is gone: so much the better
