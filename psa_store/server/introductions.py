"""HELLO and WELCOME: which process a connection leads to, in both directions. Used by the event loop's thread only."""

from __future__ import annotations

import re
import socket

from psa_store.errors import Refused
from psa_store.job.config import JobConfig
from psa_store.server.clients import Client, SharedParameters
from psa_store.server.connections import Connections
from psa_store.wire import Connection, Header, Hello, Kind, Role, Welcome, decode, encode

_MEMBER = re.compile(r"[!-~]+")


class Introductions:
    """``member`` is this server's present name; ``layout``: the fingerprint that a peer must say."""

    def __init__(
        self, member: str, config: JobConfig, layout: str, connections: Connections, clients: SharedParameters
    ) -> None:
        self.member = member
        self._job = config.name
        self._layout = layout
        self._workers_go_on = not config.shares_memory
        self._connections = connections
        self._parameters = clients

    def on_hello(self, connection: Connection, payload: memoryview) -> None:
        """Note which process connects: a worker, or a server, which says no ``by_reference``.

        Raises:
            Refused: it is of another job, layout or protocol, or has no proper name.
        """
        hello = decode(Hello, payload)
        for what, here, there in (("job", self._job, hello.job), ("layout", self._layout, hello.layout)):
            if here != there:
                raise Refused(f"{what} is {here!r} here and {there!r} there")
        says = Role.SERVER if hello.by_reference is None else Role.WORKER
        if connection.role not in (None, says):
            raise Refused(f"HELLO of a {says.name.lower()} over a connection of a {connection.role.name.lower()}")
        if connection.member or not _MEMBER.fullmatch(hello.member):
            raise Refused("HELLO without a name, or for the second time")
        clients = self._parameters.clients
        for other in [each.connection for each in clients.values() if each.member == hello.member]:
            self._connections.close(other)  # its owner has left it: one member has one connection
        connection.member = connection.peer = hello.member
        if hello.by_reference is not None and self._workers_go_on:
            connection.wait_for_slow_reader()  # a worker that computes does not read, for as long as its step takes
        clients[connection] = Client(connection, hello.member, connection.is_local and bool(hello.by_reference))
        text = encode(Welcome(self.member))
        self._connections.send(connection, Header(Kind.WELCOME, length=len(text)), text)

    def introduce(self, sock: socket.socket, server: str) -> Connection:
        """Say HELLO to another server, over a socket that leads to it."""
        connection = self._connections.add(sock, server)
        connection.member = server
        text = encode(Hello(self._job, self._layout, self.member))
        self._connections.send(connection, Header(Kind.HELLO, length=len(text)), text)
        return connection
