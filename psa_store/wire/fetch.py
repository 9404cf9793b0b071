"""A few shards by value, over a connection of its own: it disturbs nothing that is under way on another one."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from psa_store.errors import Disconnected, Refused
from psa_store.wire.address import connect
from psa_store.wire.documents import Hello, Refusal, decode, encode
from psa_store.wire.door import Door
from psa_store.wire.frames import HEADER_BYTES, Header, Kind, unpack
from psa_store.wire.handshake import Role


def fetch(
    address: str,
    local: str,
    host: str,
    hello: Hello,
    pulls: Sequence[Header],
    places: Mapping[int, memoryview],
    timeout_s: float,
    door: Door,
) -> set[int]:
    """Send these PULLs to the server at this address; returns the versions that have come.

    Args:
        places: by shard, the memory for what comes.
        timeout_s: how long the server may be silent.

    Raises:
        Disconnected: it does not answer in time, refuses, or sends something else.
    """
    text = encode(hello)
    frames = [Header(Kind.HELLO, length=len(text)).pack(), text, *(pull.pack() for pull in pulls)]
    with connect(address, local, host, timeout_s, door, Role.WORKER) as sock:
        try:
            sock.settimeout(timeout_s)
            sock.sendall(b"".join(frames))
            missing = {pull.shard for pull in pulls}
            versions: set[int] = set()
            while missing:
                header = _header(sock)
                if header.kind is Kind.PARAMS:
                    missing.remove(header.shard)
                    versions.add(header.step)
                    _fill(sock, _place(header, places))
                    continue
                payload = memoryview(bytearray(header.length))
                _fill(sock, payload)
                if header.kind is not Kind.WELCOME:
                    why = decode(Refusal, payload).why if header.kind is Kind.REFUSED else header.kind.name
                    raise Refused(why)
        except (OSError, Refused, KeyError) as error:
            raise Disconnected(f"the server at {address} does not send what was asked for: {error}") from error
    return versions


def _header(sock: socket.socket) -> Header:
    data = memoryview(bytearray(HEADER_BYTES))
    _fill(sock, data)
    return unpack(data)


def _place(header: Header, places: Mapping[int, memoryview]) -> memoryview:
    place = places[header.shard]
    if len(place) != header.length:
        raise Refused(f"{header.length} bytes of shard {header.shard}, which has {len(place)}")
    return place


def _fill(sock: socket.socket, place: memoryview) -> None:
    done = 0
    while done < len(place):
        count = sock.recv_into(place[done:])
        if count == 0:
            raise ConnectionResetError("it closed the connection")
        done += count
