"""The framed protocol between workers and servers. The only room that knows sockets."""

from psa_store.wire.address import (
    connect,
    host_identity,
    host_port,
    listen_local,
    listen_tcp,
    route_to,
)
from psa_store.wire.announce import announce, listen_announcements, read_announcement
from psa_store.wire.connection import DISCARD, PARK, Admit, Connection, Park, Place, Traffic
from psa_store.wire.documents import Hello, Refusal, Report, Welcome, decode, encode
from psa_store.wire.door import Door, is_own
from psa_store.wire.fetch import fetch
from psa_store.wire.frames import PROTOCOL, RELAY_HEAD, Flag, Header, Kind, Reason
from psa_store.wire.handshake import Accepting, FirstFrame, Rejected, Role
from psa_store.wire.inspect import inspect
from psa_store.wire.loopback import measure_loopback
from psa_store.wire.mailbox import Mailbox
from psa_store.wire.memory import CopyOnWrite, Passable, PassedMemory, SharedMemory, Window, can_show
from psa_store.wire.tls import Tls, TlsSocket

__all__ = [
    "DISCARD",
    "PARK",
    "PROTOCOL",
    "RELAY_HEAD",
    "Accepting",
    "Admit",
    "Connection",
    "CopyOnWrite",
    "Door",
    "FirstFrame",
    "Flag",
    "Header",
    "Hello",
    "Kind",
    "Mailbox",
    "Park",
    "Passable",
    "PassedMemory",
    "Place",
    "Reason",
    "Refusal",
    "Rejected",
    "Report",
    "Role",
    "SharedMemory",
    "Tls",
    "TlsSocket",
    "Traffic",
    "Welcome",
    "Window",
    "announce",
    "can_show",
    "connect",
    "decode",
    "encode",
    "fetch",
    "host_identity",
    "host_port",
    "inspect",
    "is_own",
    "listen_announcements",
    "listen_local",
    "listen_tcp",
    "measure_loopback",
    "read_announcement",
    "route_to",
]
