"""What a process needs to be let in by others, and to let them in: the key, the job that it is proved for, TLS."""

from __future__ import annotations

import os
import secrets
import socket
import ssl
import struct
import time
from dataclasses import dataclass, field

from psa_store.config import Settings, cluster_key
from psa_store.errors import Disconnected, Unproved, UsageError
from psa_store.wire.handshake import NONCE_BYTES, Accepting, Connecting, FirstFrame, Rejected, Role
from psa_store.wire.tls import Tls

_CREDENTIALS = struct.Struct("3i")
_BLOCKS_S = 0.001
"""Not 0: that would mean not to wait, and another kind of error."""


@dataclass(frozen=True, slots=True)
class Door:
    """``key`` is None where every process of this machine's user, or of its loopback, may enter."""

    job: str
    key: bytes | None = field(default=None, repr=False)
    tls: Tls | None = None
    """Over TCP, before the key."""

    @classmethod
    def from_settings(cls, settings: Settings, job: str) -> Door:
        """Read the key and the certificates; raises UsageError if they cannot be used."""
        cert, key, ca = settings.tls_cert, settings.tls_key, settings.tls_ca
        tls = None
        if cert is not None and key is not None and ca is not None:
            tls = Tls(cert, key, ca)
        elif not cert is key is ca is None:
            raise UsageError("PSA_TLS_CERT, PSA_TLS_KEY and PSA_TLS_CA go together: set all of them, or none")
        return cls(job, cluster_key(settings), tls)

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
        except ssl.SSLError as error:  # TLS 1.3 tells here that the server does not take our certificate
            raise _not_shaken(error) from error
        except OSError as error:
            raise Disconnected(f"lost the server before the key was proved: {error}") from error

    def wrap(self, sock: socket.socket) -> socket.socket:
        """Speak TLS over a TCP connection to a server from now on, if there are certificates.

        Raises:
            Unproved: the server has no certificate of the same authority, or speaks no TLS.
            Disconnected: it does not answer in time, or closes the connection.
        """
        if self.tls is None:
            return sock
        try:
            return self.tls.connect(sock)
        except ssl.SSLError as error:
            raise _not_shaken(error) from error
        except OSError as error:
            raise Disconnected(f"lost the server before TLS was agreed on: {error}") from error


def _not_shaken(error: ssl.SSLError) -> Unproved:
    why = getattr(error, "verify_message", "") or error.reason or str(error)
    return Unproved(
        f"no TLS with the server ({why}): PSA_TLS_CERT, PSA_TLS_KEY and PSA_TLS_CA must be set on both sides, "
        "with certificates that the same authority has signed"
    )


def is_own(sock: socket.socket) -> bool:
    """Whether the other end of a Unix socket belongs to the user of this process."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(uid == os.geteuid())


def _say_last(sock: socket.socket, answer: bytes) -> None:
    try:
        sock.sendall(answer)
    except OSError:
        pass  # it is gone: so much the better
