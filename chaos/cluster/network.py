"""Hosts of their own on one machine, and what can happen to the network between them.

Each host is a network namespace with one link, ``eth0``, into a switch: a bridge in one more namespace, so that
neither the routes nor the packet filter of this machine decide what passes. This machine has a link into the
switch too, and reaches all hosts.

There is no ARP: every host knows the link-layer address of every other, for good. A fault is therefore silent, as
the worst ones are: packets vanish, no error is raised, no route fails, and a TCP connection that outlives the fault
goes on. Faults need root, `ip` and `tc`, but neither a packet filter nor `netem`.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import random
import re
import shutil
import socket
import string
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_NAMESPACES = Path("/var/run/netns")
_CLONE_NEWNET = 0x40000000
_OWNED = re.compile(r"psa(\d+)[a-z](-.+)?")
_SUBNETS = list(ipaddress.IPv4Network("10.64.0.0/10").subnets(new_prefix=24))
_SUBNET_ATTEMPTS = 100
_BRIDGE = "switch"
_UPLINK = "uplink"
_NO_HOST = "02:ff:ff:ff:ff:ff"
_BURST_BYTES = 32 << 10
_QUEUE_MS = 200
_COMMAND_S = 30.0
_FORWARDING_S = 10.0
_POLL_S = 0.005
_PROBE_S = 0.3
_CLOSED_PORT = 9


@dataclass(frozen=True, slots=True)
class Host:
    """Where a process runs. ``namespace``: the name of its network namespace, None for that of the harness."""

    name: str
    address: str
    namespace: str | None


LOOPBACK = Host("localhost", "127.0.0.1", None)


class Network:
    """Hosts on one switch, from enter to exit of the context. Not thread-safe: faults are done and healed in turn."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._hosts: dict[str, Host] = {}
        self._own = ""
        self._muted: set[tuple[str, str]] = set()
        self._isolated: set[str] = set()
        self._throttled: set[str] = set()

    def __enter__(self) -> Self:
        remove_leftovers()
        with ExitStack() as undo:
            undo.callback(self._remove)
            self._create()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def host(self, name: str) -> Host:
        return self._hosts[name]

    def cut(self, a: str, b: str) -> None:
        """Nothing passes between two hosts, in either direction."""
        self.cut_one_way(a, b)
        self.cut_one_way(b, a)

    def cut_one_way(self, source: str, target: str) -> None:
        """What ``source`` sends to ``target`` vanishes; the other direction works."""
        self._muted.add((source, target))
        self._address_frames(source, target, _NO_HOST)

    def isolate(self, name: str) -> None:
        """Nothing passes between a host and any other, this machine included."""
        self._isolated.add(name)
        self._plug(name, "nomaster")

    def throttle(self, name: str, bytes_per_s: int) -> None:
        """Limit what a host sends, and what it receives; TCP gets a little less, as headers count."""
        self._throttled.add(name)
        limit = f"tbf rate {bytes_per_s}bps burst {_BURST_BYTES} latency {_QUEUE_MS}ms"
        self._set_queue(name, limit)

    def reaches(self, source: str, target: str) -> bool:
        """Return whether a packet of ``source`` gets to ``target`` and an answer comes back."""
        found: list[bool] = []

        def probe() -> None:
            enter(_namespace(self.host(source)))
            with socket.socket() as sock:
                sock.settimeout(_PROBE_S)
                try:
                    sock.connect((self.host(target).address, _CLOSED_PORT))
                except ConnectionRefusedError:
                    found.append(True)  # no process listens there, but the host answered
                except OSError:
                    found.append(False)
                else:
                    found.append(True)

        thread = threading.Thread(target=probe, name="chaos-probe")  # of its own: it does not come back
        thread.start()
        thread.join()
        return found == [True]

    def heal(self) -> None:
        """Undo all faults. Idempotent."""
        for source, target in sorted(self._muted):
            self._address_frames(source, target, _mac(self.host(target).address))
        self._muted.clear()
        for name in sorted(self._isolated):
            self._plug(name, f"master {_BRIDGE}")
        self._isolated.clear()
        for name in sorted(self._throttled):
            self._set_queue(name, "noqueue")
        self._throttled.clear()

    def _create(self) -> None:
        self._own = _free_name()
        here, *addresses = map(str, list(_free_subnet().hosts())[: len(self._names) + 1])
        self._hosts = {
            name: Host(name, address, f"{self._own}-{name}")
            for name, address in zip(self._names, addresses, strict=True)
        }
        namespaces = [self._own, *(f"{self._own}-{name}" for name in self._names)]
        _ip_batch(None, (f"netns add {namespace}" for namespace in namespaces))
        _ip_batch(
            self._own,
            [
                f"link add {_BRIDGE} type bridge",
                f"link set {_BRIDGE} up",
                *(
                    f"link add {host.name} type veth peer name eth0 address {_mac(host.address)} netns {host.namespace}"
                    for host in self._hosts.values()
                ),
                *(f"link set {name} master {_BRIDGE} up" for name in self._names),
            ],
        )
        for host in self._hosts.values():
            others = [here, *(address for address in addresses if address != host.address)]
            _ip_batch(host.namespace, ["link set lo up", *_configuration("eth0", host.address, others)])
        _ip_batch(
            None,
            [
                f"link add {self._own} address {_mac(here)} type veth peer name {_UPLINK} netns {self._own}",
                *_configuration(self._own, here, addresses),
            ],
        )
        _ip_batch(self._own, [f"link set {_UPLINK} master {_BRIDGE} up"])
        self._wait_until_forwarding()

    def _wait_until_forwarding(self) -> None:
        """The kernel opens a port of a bridge some time after its link is up."""
        end_s = time.monotonic() + _FORWARDING_S
        while True:
            links = json.loads(_run(["ip", "-n", self._own, "-details", "-json", "link", "show", "master", _BRIDGE]))
            states = {link["ifname"]: link["linkinfo"]["info_slave_data"]["state"] for link in links}
            if set(states) == {*self._names, _UPLINK} and set(states.values()) == {"forwarding"}:
                return
            if time.monotonic() > end_s:
                raise RuntimeError(f"the switch {self._own} does not forward: {states}")
            time.sleep(_POLL_S)

    def _remove(self) -> None:
        if self._own:
            _remove_everything_of(self._own)

    def _address_frames(self, source: str, target: str, mac: str) -> None:
        """Set the link-layer address to which ``source`` sends frames for ``target``."""
        address = self.host(target).address
        _run(["ip", "-n", _namespace(self.host(source)), *_neighbour(address, mac, "eth0").split()])

    def _plug(self, name: str, where: str) -> None:
        # Not by taking the link down: then the host would know, and the kernel may take a second to notice it is up.
        # Nor by the state of the port: the kernel opens it again when it looks at the link.
        _run(["ip", "-n", self._own, "link", "set", name, *where.split()])

    def _set_queue(self, name: str, queue: str) -> None:
        """Of both ends of a host's link: a queue shapes only what leaves it."""
        host = self.host(name)
        for namespace, link in ((_namespace(host), "eth0"), (self._own, name)):
            _run(["tc", "-n", namespace, "qdisc", "replace", "dev", link, "root", *queue.split()])


def namespaces_available() -> str | None:
    """Return why there can be no :class:`Network` here; None if there can."""
    missing = [program for program in ("ip", "tc", "unshare") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: `apt-get install iproute2 util-linux`"
    if os.geteuid() != 0:
        return "network namespaces need root"
    # In namespaces that end with the command; containers have a root that may not do this.
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "ip", "link", "add", "probe", "type", "bridge"],
        capture_output=True,
        text=True,
        timeout=_COMMAND_S,
    )
    return None if probe.returncode == 0 else f"no network namespaces: {probe.stderr.strip()}"


def enter(namespace: str) -> None:
    """Move the calling thread, and what it starts, into a network namespace (Python 3.11 has no os.setns)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(_NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), namespace)
    finally:
        os.close(fd)


def remove_leftovers() -> None:
    """Remove the networks of harness processes that were killed."""
    for own in sorted(_networks()):
        match = _OWNED.fullmatch(own)
        if match is not None and not Path("/proc", match[1]).exists():
            _remove_everything_of(own)


def _networks() -> set[str]:
    """The names of all networks of any process, complete or not."""
    namespaces = os.listdir(_NAMESPACES) if _NAMESPACES.exists() else []
    return {name.partition("-")[0] for name in (*namespaces, *_links()) if _OWNED.fullmatch(name)}


def _links() -> list[str]:
    return [link["ifname"] for link in json.loads(_run(["ip", "-json", "link", "show"]))]


def _free_name() -> str:
    """Unique on this machine, and short: the name of a link has at most 15 characters."""
    taken = _networks()
    return next(name for last in string.ascii_lowercase if (name := f"psa{os.getpid()}{last}") not in taken)


def _free_subnet() -> ipaddress.IPv4Network:
    """One that no route of this machine covers; random, so that processes that ask at once get different ones."""
    routes = [route["dst"] for route in json.loads(_run(["ip", "-json", "-4", "route", "show", "table", "all"]))]
    taken = [ipaddress.IPv4Network(target) for target in routes if target != "default"]
    for subnet in random.SystemRandom().sample(_SUBNETS, _SUBNET_ATTEMPTS):
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise RuntimeError("all of 10.64.0.0/10 is in use on this machine")


def _remove_everything_of(own: str) -> None:
    # The link first: it goes at once. Namespaces end later, with their last process, but the switch has none.
    if own in _links():
        _run(["ip", "link", "delete", own])
    found = sorted(path.name for path in _NAMESPACES.glob(f"{own}*") if path.name.partition("-")[0] == own)
    _ip_batch(None, (f"netns delete {namespace}" for namespace in found))


def _configuration(link: str, address: str, others: Iterable[str]) -> list[str]:
    return [
        f"link set {link} up",
        f"address add {address}/24 dev {link}",
        *(_neighbour(other, _mac(other), link) for other in others),
    ]


def _neighbour(address: str, mac: str, link: str) -> str:
    return f"neighbour replace {address} lladdr {mac} nud permanent dev {link}"


def _mac(address: str) -> str:
    """A locally administered one, made of the IPv4 address."""
    return "02:00:" + ipaddress.IPv4Address(address).packed.hex(":")


def _namespace(host: Host) -> str:
    assert host.namespace is not None, host
    return host.namespace


def _ip_batch(namespace: str | None, commands: Iterable[str]) -> None:
    """Many commands of `ip` in one process."""
    where = [] if namespace is None else ["-n", namespace]
    _run(["ip", *where, "-batch", "-"], "\n".join(commands))


def _run(command: Sequence[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_COMMAND_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{text}".strip())
    return done.stdout
