"""Where a server listens, and what it tells others of that.

Others read the address in ZooKeeper. It has to be right on their machines, which this one cannot try: so it is what a
person says (``PSA_ADVERTISE``), or the address on which it listens, if that is one, and never one with which every
machine reaches itself.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

from psa_store import logs
from psa_store.config import Settings
from psa_store.config.listening import Advertised, is_any, is_loopback, parse_advertised, parse_ports
from psa_store.coordination.access import access_of
from psa_store.errors import UsageError
from psa_store.storage import known_redis
from psa_store.storage.addresses import read_address
from psa_store.wire import host_port, listen_tcp, route_to

_ANY_FREE = (0,)


def advertised(settings: Settings) -> Advertised:
    """Find out what to tell others.

    Raises:
        UsageError: no address is known at which the machines of Redis and ZooKeeper reach this one.
    """
    if settings.advertise is not None:
        return parse_advertised(settings.advertise)
    if is_any(settings.bind):
        for own, _ in _routes(settings):
            if not is_loopback(own):
                return Advertised(own)
        raise UsageError(
            f"PSA_BIND={settings.bind} is any address of this machine, Redis and ZooKeeper are here as well, and which "
            "of the addresses others reach is not known: set PSA_ADVERTISE to it"
        )
    # Under `psa run` all are on this machine, and those that join from another are told why they cannot.
    if is_loopback(settings.bind) and settings.run is None and not all(is_here for _, is_here in _routes(settings)):
        raise UsageError(
            f"PSA_BIND={settings.bind} is reached from this machine alone, and Redis or ZooKeeper is on another: "
            "set PSA_BIND to the address of this machine that the others reach. If all processes of the job run here, "
            f"set PSA_ADVERTISE={settings.bind}"
        )
    return Advertised(settings.bind)


def listen(settings: Settings, told: Advertised) -> tuple[socket.socket, str]:
    """Listen as the settings say; returns the socket and the ``host:port`` to tell others.

    Raises:
        DependencyUnreachable: the address is not one of this machine's, or no port of those named is free.
    """
    sock, own = listen_tcp(settings.bind, parse_ports(settings.port) if settings.port else _ANY_FREE)
    address = host_port(told.host, told.port or sock.getsockname()[1])
    if address != own:
        logs.get_logger().info("listening", on=own, advertised=address)
    return sock, address


def _routes(settings: Settings) -> Iterator[tuple[str, bool]]:
    """For ZooKeeper and Redis: this machine's address on the way there, and whether they are here."""
    for host, port in (*access_of(settings).addresses, *read_address(known_redis(settings)).addresses):
        with suppress(OSError):  # what connects there says what is wrong
            yield route_to(host, port)
