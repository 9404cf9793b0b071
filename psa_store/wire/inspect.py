"""One question to a server, and its answer: what it does now. For people and dashboards, not for training."""

from __future__ import annotations

import socket
import time

from psa_store.errors import Disconnected, Refused
from psa_store.wire.address import connect
from psa_store.wire.documents import Refusal, Report, decode
from psa_store.wire.door import Door
from psa_store.wire.frames import HEADER_BYTES, Header, Kind, unpack
from psa_store.wire.handshake import Role

_BLOCKS_S = 0.001
"""Not 0: that would mean not to wait, and another kind of error."""


def inspect(address: str, local: str, host: str, timeout_s: float, door: Door) -> Report:
    """Ask the server at this address.

    Raises:
        Disconnected: it does not answer within ``timeout_s``, or not with a report.
    """
    end_s = time.monotonic() + timeout_s
    with connect(address, local, host, timeout_s, door, Role.OBSERVER) as sock:
        try:
            sock.settimeout(timeout_s)
            sock.sendall(Header(Kind.INSPECT).pack())
            header = unpack(_exactly(sock, HEADER_BYTES, end_s))
            payload = _exactly(sock, header.length, end_s)
            if header.kind is Kind.REPORT:
                return decode(Report, payload)
            if header.kind is Kind.REFUSED:
                raise Refused(decode(Refusal, payload).why)
        except (OSError, Refused) as error:
            raise Disconnected(f"the server at {address} does not answer: {error}") from error
    raise Disconnected(f"the server at {address} answered {header.kind.name}")


def _exactly(sock: socket.socket, count: int, end_s: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        sock.settimeout(max(_BLOCKS_S, end_s - time.monotonic()))
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionResetError("it closed the connection")
        data += part
    return bytes(data)
