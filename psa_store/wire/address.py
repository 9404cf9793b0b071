"""Where servers listen and how clients reach them: a Unix socket on the same host, TCP between hosts."""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from psa_store.config.listening import is_loopback
from psa_store.errors import DependencyUnreachable, Disconnected
from psa_store.wire.door import Door, is_own
from psa_store.wire.handshake import Role

_BACKLOG = 1024
_ANY_FREE = (0,)
_ANY_IPV6 = "::"


@cache
def host_identity() -> str:
    """A name for this machine that no other has at the same time: host name and boot id."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip()}" if boot.exists() else socket.gethostname()


def listen_tcp(bind: str, ports: Iterable[int] = _ANY_FREE) -> tuple[socket.socket, str]:
    """Listen on the first port of ``bind`` that is free; returns the socket and the ``host:port`` to advertise.

    Raises:
        DependencyUnreachable: the address is not one of this machine's, or none of these ports is free.
    """
    try:
        family = socket.getaddrinfo(bind, None)[0][0]
        sock = _first_free(bind, family, list(ports))
    except OSError as error:
        raise DependencyUnreachable(
            f"cannot listen on {bind}: {error}. Set PSA_BIND to an address of this machine, and PSA_PORT to ports "
            "that are free, if it is set."
        ) from error
    sock.setblocking(False)
    return sock, host_port(bind, sock.getsockname()[1])


def host_port(host: str, port: int) -> str:
    """One text for both, as it is written for IPv6, too."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def route_to(host: str, port: int) -> tuple[str, bool]:
    """The address of this machine from which it would reach a host, and whether that is this machine itself.

    Nothing is sent. Raises OSError: there is no way.
    """
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as sock:
        sock.connect(target)
        own = str(sock.getsockname()[0])
    # On the way to one address of this machine the kernel may name another; but only its own can be bound.
    with socket.socket(family, kind) as sock:
        try:
            sock.bind((target[0], 0))
        except OSError:
            return own, False
    return own, True


def _first_free(bind: str, family: int, ports: list[int]) -> socket.socket:
    for port in ports:
        try:
            both = family == socket.AF_INET6 and bind == _ANY_IPV6 and socket.has_dualstack_ipv6()
            return socket.create_server((bind, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise
    raise AssertionError("no port was named")


def listen_local(name: str) -> socket.socket | None:
    """Listen on an abstract Unix socket, which leaves nothing behind when the process dies; None without them."""
    if sys.platform != "linux":
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("\0" + name)
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock


def connect(address: str, local: str, host: str, timeout_s: float, door: Door, role: Role) -> socket.socket:
    """Connect to a server, by its Unix socket if it is on this host and reachable, else by TCP; prove the key.

    Raises:
        Disconnected: it does not answer within ``timeout_s``.
        Unproved: one of the two has not got the key of the other.
    """
    end_s = time.monotonic() + timeout_s
    sock = _connect_local(local, timeout_s) if local and host == host_identity() else None
    if sock is None:
        sock = _connect_tcp(address, host, timeout_s, door)
    try:
        door.enter(sock, role, end_s)
    except BaseException:
        sock.close()
        raise
    sock.settimeout(timeout_s)
    return sock


def _connect_local(local: str, timeout_s: float) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect("\0" + local)
        if is_own(sock):  # any user of this machine may listen under a name that is free
            return sock
    except (OSError, ValueError):  # another network namespace, gone, or no name at all: TCP tells
        pass
    sock.close()
    return None


def _connect_tcp(address: str, host: str, timeout_s: float, door: Door) -> socket.socket:
    name, _, port = address.rpartition(":")
    try:
        sock = socket.create_connection((name.strip("[]"), int(port)), timeout=timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a proof must not wait for an acknowledgement
    except (OSError, ValueError, OverflowError) as error:
        # That of another machine is our own here.
        why = "; it listens for its own machine alone: set PSA_BIND or PSA_ADVERTISE there"
        elsewhere = host != host_identity() and is_loopback(name.strip("[]"))
        raise Disconnected(f"cannot reach the server at {address}: {error}{why if elsewhere else ''}") from error
    try:
        return door.wrap(sock)
    except BaseException:
        sock.close()
        raise
