"""How fast this machine moves bytes over TCP to itself: what workers and servers cannot exceed where they use it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from psa_store.errors import Disconnected

_CALL_BYTES = 1 << 20


def measure_loopback(size_bytes: int, timeout_s: float) -> float:
    """Send ``size_bytes``, or as many as ``timeout_s`` allows; returns bytes per second.

    Raises:
        Disconnected: there is no loopback, or nothing came through it.
    """
    received = 0
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sender = socket.create_connection(listener.getsockname(), timeout=timeout_s)
            receiver, _ = listener.accept()
        thread = threading.Thread(target=_send, args=(sender, size_bytes), name="psa-loopback")
        with sender, receiver:
            receiver.settimeout(timeout_s)
            place = memoryview(bytearray(_CALL_BYTES))
            started_s = time.perf_counter()
            thread.start()
            try:
                while (took_s := time.perf_counter() - started_s) < timeout_s and received < size_bytes:
                    count = receiver.recv_into(place)
                    if count == 0:
                        break
                    received += count
                    took_s = time.perf_counter() - started_s
            finally:
                with contextlib.suppress(OSError):  # the sender has hung up already
                    receiver.shutdown(socket.SHUT_RDWR)
                thread.join()
    except OSError as error:
        raise Disconnected(f"127.0.0.1: {error}") from error
    if received == 0:
        raise Disconnected("127.0.0.1: nothing came through")
    return received / took_s


def _send(sender: socket.socket, size_bytes: int) -> None:
    chunk = memoryview(bytes(_CALL_BYTES))
    left = size_bytes
    with contextlib.suppress(OSError):  # the receiver has seen enough
        while left > 0:
            sender.sendall(chunk[: min(left, _CALL_BYTES)])
            left -= _CALL_BYTES
        sender.shutdown(socket.SHUT_WR)
