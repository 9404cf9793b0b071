"""A TCP proxy that cuts its connections where a test says: in the middle of a request, or of an answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable


class Proxy:
    """Passes bytes between its own port and another one of this machine until a fault that was armed is due.

    ``fired`` counts the faults that happened. A fault happens once; ``forever`` also refuses all later connections.
    """

    def __init__(self, target_port: int) -> None:
        self.fired = 0
        self._target_port = target_port
        self._lock = threading.Lock()
        self._due: Callable[[str, bytes], int | None] | None = None
        self._forever = False
        self._refusing = False
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)

    def cut_requests_after(self, count: int) -> None:
        """Pass so many more bytes to the server, then cut."""
        self._arm(_after("requests", count), False)

    def cut_answers_after(self, count: int) -> None:
        """Pass so many more bytes to the client, then cut: later answers are lost, their commands are not."""
        self._arm(_after("answers", count), False)

    def cut_before(self, word: bytes, *, forever: bool) -> None:
        """Cut before the command with this word gets to the server. What was sent before it does."""

        def due(direction: str, data: bytes) -> int | None:
            return data.rfind(b"*", 0, data.find(word)) if direction == "requests" and word in data else None

        self._arm(due, forever)

    def close(self) -> None:
        self._refusing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _arm(self, due: Callable[[str, bytes], int | None], forever: bool) -> None:
        with self._lock:
            self._due, self._forever = due, forever

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, name="proxy")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target_port))
            self._open |= {client, server}
            self._start(self._pass, "requests", client, server)
            self._start(self._pass, "answers", server, client)

    def _pass(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                with self._lock:
                    at = self._due(direction, data) if self._due else None
                    if at is not None:
                        self._due = None
                        self._refusing = self._refusing or self._forever
                        self.fired += 1
                sink.sendall(data if at is None else data[:at])
                if at is not None:
                    break
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _cut(self) -> None:
        for end in self._open:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()


def _after(wanted: str, count: int) -> Callable[[str, bytes], int | None]:
    left = count

    def due(direction: str, data: bytes) -> int | None:
        nonlocal left
        if direction != wanted:
            return None
        left -= len(data)
        return left + len(data) if left < 0 else None

    return due
