"""One datagram from a process to the supervisor that started it, which takes it from no other user.

The socket lies in a folder that its owner alone can enter, and the kernel says of each datagram which user sent it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

_MESSAGE_BYTES_MAX = 65536
_CREDENTIALS = struct.Struct("3i")


def listen_announcements(path: Path) -> socket.socket:
    """Make the socket of a supervisor, non-blocking; see :func:`read_announcement`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    sock.bind(str(path))
    sock.setblocking(False)
    return sock


def announce(supervisor: Path, document: dict[str, Any]) -> None:
    """Tell the supervisor something, as JSON. If it is gone, nothing happens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(json.dumps(document).encode(), str(supervisor))


def read_announcement(sock: socket.socket) -> dict[str, Any] | None:
    """Return what a process has announced; an empty one if it was not sent by this user, or is none; None: no more."""
    try:
        data, ancillary, flags, _ = sock.recvmsg(_MESSAGE_BYTES_MAX, socket.CMSG_SPACE(_CREDENTIALS.size))
    except BlockingIOError:
        return None
    senders = [
        _CREDENTIALS.unpack(content)[1]
        for level, kind, content in ancillary
        if (level, kind, len(content)) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, _CREDENTIALS.size)
    ]
    if senders != [os.geteuid()] or flags & socket.MSG_TRUNC:
        return {}
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
