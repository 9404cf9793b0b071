"""One datagram from a process to the supervisor that started it."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any


def announce(supervisor: Path, document: dict[str, Any]) -> None:
    """Tell the supervisor something, as JSON. If it is gone, nothing happens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(json.dumps(document).encode(), str(supervisor))
