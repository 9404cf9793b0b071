"""Names of processes. An id is never reused: a process that comes back after a death has another one."""

from __future__ import annotations

import os
import secrets


def new_member_id(role: str) -> str:
    """A fresh id such as ``worker-4711-9f03ab``: role, process id, and enough randomness to be unique."""
    return f"{role}-{os.getpid()}-{secrets.token_hex(3)}"
