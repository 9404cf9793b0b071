"""What PSA_BIND, PSA_PORT and PSA_ADVERTISE may say. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from psa_store.errors import UsageError

_PORT_END = 1 << 16


@dataclass(frozen=True, slots=True)
class Advertised:
    """What others are told. ``port``: None: the one on which a server listens."""

    host: str
    port: int | None = None


def parse_ports(text: str) -> range:
    """Read ``7000`` or ``7000-7099``; raises UsageError."""
    low, dash, high = text.partition("-")
    if low.isdecimal() and (high.isdecimal() or not dash):
        ports = range(int(low), int(high or low) + 1)
        if ports and 0 < ports[0] <= ports[-1] < _PORT_END:
            return ports
    raise UsageError(f"{text!r}: use a port, or LOW-HIGH, between 1 and {_PORT_END - 1}")


def parse_advertised(text: str) -> Advertised:
    """Read what :func:`split_host_port` does; raises UsageError."""
    return Advertised(*split_host_port(text))


def split_host_port(text: str) -> tuple[str, int | None]:
    """Read ``host``, ``host:port``, ``::1`` or ``[::1]:port``; raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]") or (":" in host and not host.endswith("]")):
        host, port = text, ""  # no port: a name, or an IPv6 address
    elif not port:
        host = ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or any(each.isspace() or each in "[]" for each in host):
        raise UsageError(f"{text!r}: use HOST or HOST:PORT")
    return host, parse_ports(port)[0] if port else None


def is_loopback(bind: str) -> bool:
    """Whether an address reaches no other machine."""
    try:
        return ipaddress.ip_address(bind).is_loopback
    except ValueError:
        return bind == "localhost"


def is_any(bind: str) -> bool:
    """Whether it stands for all addresses of the machine."""
    try:
        return ipaddress.ip_address(bind).is_unspecified
    except ValueError:
        return False
