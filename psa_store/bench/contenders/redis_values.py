"""The limit of Redis: one connection, values of 4 MiB, a plain socket, no client library."""

from __future__ import annotations

import socket
from urllib.parse import unquote, urlsplit

import torch

from psa_store.bench.children import ChildProcesses, CommandPipe, Stepper
from psa_store.bench.contender import Contender
from psa_store.bench.names import REDIS_GET, REDIS_SET
from psa_store.bench.workload import Workload
from psa_store.errors import Disconnected

_VALUE_BYTES = 4 << 20
_TIMEOUT_S = 60.0


def start_set(workload: Workload, processes: ChildProcesses, url: str) -> Contender:
    """``url``: of a Redis that keeps values in memory only."""
    return _start(REDIS_SET, workload, processes, url, reads=False)


def start_get(workload: Workload, processes: ChildProcesses, url: str) -> Contender:
    """As :func:`start_set`."""
    return _start(REDIS_GET, workload, processes, url, reads=True)


def _start(name: str, workload: Workload, processes: ChildProcesses, url: str, reads: bool) -> Contender:
    return Contender(name, [processes.spawn(name, _talk, workload.size_bytes, url, reads)])


def _talk(commands: CommandPipe, size_bytes: int, url: str, reads: bool) -> None:
    with _connect(url) as sock:
        writes = _Writes(size_bytes, sock)
        if reads:
            writes.step()
        commands.handle(_Reads(size_bytes, sock) if reads else writes)


def _connect(url: str) -> socket.socket:
    """A plain connection to ``unix://:password@/path`` or ``redis://:password@host:port``, past the password if any."""
    parts = urlsplit(url)
    if parts.scheme == "redis":
        sock = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=_TIMEOUT_S)
    else:
        sock = socket.socket(socket.AF_UNIX)
    try:
        if parts.scheme != "redis":
            sock.settimeout(_TIMEOUT_S)
            sock.connect(unquote(parts.path))
        if parts.password:
            password = unquote(parts.password).encode()
            sock.sendall(b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n" % (len(password), password))
            _expect(sock, b"+OK\r\n")
    except BaseException:
        sock.close()
        raise
    return sock


class _Values(Stepper):
    def __init__(self, size_bytes: int, sock: socket.socket) -> None:
        self._sock = sock
        memory = torch.ones(size_bytes, dtype=torch.uint8).numpy().data
        self._values = [memory[low : low + _VALUE_BYTES] for low in range(0, size_bytes, _VALUE_BYTES)]


class _Writes(_Values):
    """One step writes all values."""

    def step(self) -> None:
        for index, value in enumerate(self._values):
            key = _key(index)
            self._sock.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (len(key), key, len(value)))
            self._sock.sendall(value)
            self._sock.sendall(b"\r\n")
            _expect(self._sock, b"+OK\r\n")


class _Reads(_Values):
    """One step reads all values, into places of their own."""

    def step(self) -> None:
        for index, value in enumerate(self._values):
            key = _key(index)
            self._sock.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key))
            _expect(self._sock, b"$%d\r\n" % len(value))
            _fill(self._sock, value)
            _expect(self._sock, b"\r\n")


def _key(index: int) -> bytes:
    return b"value%d" % index


def _expect(sock: socket.socket, wanted: bytes) -> None:
    found = bytearray(len(wanted))
    _fill(sock, memoryview(found))
    if found != wanted:
        raise Disconnected(f"Redis answers {bytes(found)!r} instead of {wanted!r}")


def _fill(sock: socket.socket, place: memoryview) -> None:
    while place:
        count = sock.recv_into(place)
        if count == 0:
            raise Disconnected("Redis is gone")
        place = place[count:]
