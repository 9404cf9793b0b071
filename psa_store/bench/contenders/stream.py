"""The limit of loopback TCP: two processes and one connection, memory to memory, in the largest calls there are."""

from __future__ import annotations

import socket
import threading

import torch

from psa_store.bench.children import ChildProcesses, CommandPipe, Stepper
from psa_store.bench.contender import Contender
from psa_store.bench.names import STREAM, STREAM_BOTH_WAYS
from psa_store.bench.workload import Workload
from psa_store.errors import Disconnected

_TIMEOUT_S = 60.0
_CALL_BYTES = 4 << 20


def start_one_way(workload: Workload, processes: ChildProcesses) -> Contender:
    """A process that sends and one that receives."""
    return _start(STREAM, workload, processes, ((True, False), (False, True)))


def start_both_ways(workload: Workload, processes: ChildProcesses) -> Contender:
    """Two processes, each of which sends and receives."""
    return _start(STREAM_BOTH_WAYS, workload, processes, ((True, True), (True, True)))


def _start(name: str, workload: Workload, processes: ChildProcesses, parts: tuple[tuple[bool, bool], ...]) -> Contender:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=_TIMEOUT_S)
        other, _ = listener.accept()
    with one, other:
        children = [
            processes.spawn(name, _stream, workload.size_bytes, end, sends, receives)
            for end, (sends, receives) in zip((one, other), parts, strict=True)
        ]
        return Contender(name, children)  # by now each has a copy of its end


def _stream(commands: CommandPipe, size_bytes: int, end: socket.socket, sends: bool, receives: bool) -> None:
    with end:
        end.settimeout(_TIMEOUT_S)
        commands.handle(_Stream(size_bytes, end, sends, receives))


class _Stream(Stepper):
    def __init__(self, size_bytes: int, end: socket.socket, sends: bool, receives: bool) -> None:
        self._end = end
        self._outgoing = _memory(size_bytes) if sends else None
        self._incoming = _memory(size_bytes) if receives else None

    def step(self) -> None:
        if self._outgoing is None:
            self._receive()
        elif self._incoming is None:
            self._end.sendall(self._outgoing)
        else:
            sender = threading.Thread(target=self._end.sendall, args=(self._outgoing,), name="bench-sender")
            sender.start()
            self._receive()
            sender.join()

    def _receive(self) -> None:
        assert self._incoming is not None
        left = self._incoming
        while left:
            count = self._end.recv_into(left, min(len(left), _CALL_BYTES))
            if count == 0:
                raise Disconnected("the other process of the stream is gone")
            left = left[count:]


def _memory(size_bytes: int) -> memoryview:
    return torch.ones(size_bytes, dtype=torch.uint8).numpy().data
