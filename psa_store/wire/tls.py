"""TLS between hosts: both sides show a certificate of the cluster's authority. Over TCP only, and before the key.

The address of a server is what it says in ZooKeeper, often a number, so names in certificates are not compared: what
counts is that the authority of the cluster has signed them. It should sign nothing else.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from psa_store.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_CHUNK_BYTES = 256 << 10
"""What is handed to TLS, or taken from it, at once. It encrypts all of it before the socket takes some."""
_Address = object


class TlsSocket(ssl.SSLSocket):
    """A TLS socket that a :class:`~psa_store.wire.connection.Connection` uses as any other, without blocking.

    What TLS would rather read or write first shows as BlockingIOError. Its handshake is done before.
    """

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        """Receive what is there, at most as much as one chunk.

        TLS itself gives one record of 16 KiB at a time. A caller that counts its calls would have few of them.
        """
        rest = memoryview(buffer)[: nbytes or None][:_CHUNK_BYTES]
        received = 0
        try:
            while received < len(rest) and (count := super().recv_into(rest[received:], None, flags)):
                received += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            if not received:
                raise BlockingIOError from error
        return received

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def send(self, data: ReadableBuffer, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def sendmsg(  # type: ignore[override]
        self,
        buffers: Iterable[ReadableBuffer],
        ancdata: Iterable[tuple[int, int, ReadableBuffer]] = (),
        flags: int = 0,
        address: _Address | None = None,
    ) -> int:
        """Send the beginning of these buffers.

        After BlockingIOError it must be called with the same beginning: TLS has encrypted it already.
        """
        assert not ancdata, "descriptors do not travel between hosts"
        chunk = bytearray()
        for buffer in buffers:
            view = memoryview(buffer)
            if not chunk and len(view) >= _CHUNK_BYTES:
                return self.send(view[:_CHUNK_BYTES], flags)
            chunk += view[: _CHUNK_BYTES - len(chunk)]
            if len(chunk) == _CHUNK_BYTES:
                break
        return self.send(chunk, flags)


class Tls:
    """The contexts of both directions. ``cert``, ``key``, ``ca``: files in PEM.

    Raises:
        UsageError: one cannot be read, or they do not belong together.
    """

    def __init__(self, cert: Path, key: Path, ca: Path) -> None:
        self._accepts = _context(ssl.PROTOCOL_TLS_SERVER, cert, key, ca)
        self._connects = _context(ssl.PROTOCOL_TLS_CLIENT, cert, key, ca)

    def accepting(self, sock: socket.socket) -> TlsSocket:
        """Wrap a socket of which nothing has been read; its handshake is the caller's to do, without blocking."""
        wrapped = self._accepts.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return cast(TlsSocket, wrapped)

    def connect(self, sock: socket.socket) -> TlsSocket:
        """Wrap a connected socket and do the handshake, within the time-out of the socket. Raises OSError."""
        return cast(TlsSocket, self._connects.wrap_socket(sock))


def _context(protocol: int, cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # connections last as long as a term: none is resumed
    context.sslsocket_class = TlsSocket
    try:
        context.load_cert_chain(cert, key)
        context.load_verify_locations(ca)
    except OSError as error:
        raise UsageError(
            f"PSA_TLS_CERT={str(cert)!r}, PSA_TLS_KEY={str(key)!r}, PSA_TLS_CA={str(ca)!r}: {error.strerror or error}"
        ) from error
    return context
