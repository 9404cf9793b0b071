"""Faults of links: in the proxies before Redis and ZooKeeper, and in the network between hosts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from chaos.cluster.network import Network
from chaos.inject.context import FIRE_WITHIN_S, Context, NotFired, alternating
from chaos.inject.processes import zookeeper_nodes
from chaos.proxy import Proxy
from chaos.schedule import ScheduledFault
from chaos.site import SERVERS_HOSTED, WORKERS, ZOOKEEPER_NODES

_FLAP_PERIOD_S = 0.15
_FLAP_DOWN_S = 0.05
_DELAY_S = 0.03
_ZK_DELAY_S = 0.1
_SLOW_LINK_BYTES_PER_S = 1_000_000


@contextmanager
def tear(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """End a connection after so many bytes of a reply or a request."""
    proxies = _proxies(context, fault)
    before = sum(proxy.fired for proxy in proxies)
    for proxy in proxies:
        if fault.kind.endswith("reply"):
            proxy.cut_replies_after(fault.number)
        else:
            proxy.cut_requests_after(fault.number)
    context.until(
        lambda: True if sum(proxy.fired for proxy in proxies) > before else None,
        FIRE_WITHIN_S,
        "nothing passed that could be torn",
    )
    yield f"torn after {fault.number} bytes"
    for proxy in proxies:
        proxy.pass_all()


@contextmanager
def disturb_proxies(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Delay, throttle, stall or refuse what passes the proxies."""
    target, _, what = fault.kind.partition("-")
    proxies = _proxies(context, fault)
    for proxy in proxies:
        match what:
            case "delay":
                proxy.delay(_DELAY_S if target == "redis" else _ZK_DELAY_S)
            case "throttle":
                proxy.throttle(_SLOW_LINK_BYTES_PER_S)
            case "stall":
                proxy.stall()
            case _:
                proxy.refuse()
    before = sum(proxy.affected for proxy in proxies)
    try:
        yield f"{what} at {len(proxies)} proxies"
        if sum(proxy.affected for proxy in proxies) == before:
            raise NotFired(f"{what}: nothing passed the proxies while it lasted")
    finally:
        for proxy in proxies:
            proxy.pass_all()


@contextmanager
def cut(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Drop all packets between two hosts, or those of one direction."""
    how, one, other = fault.kind.split("-")
    sources, targets = _hosts(one, fault), _hosts(other, fault)
    if one == other:
        targets = [f"server{(int(sources[0].removeprefix('server')) + 1) % SERVERS_HOSTED}"]
    pairs = list(itertools.product(sources, targets))
    with _healed(context) as network:
        for source, target in pairs:
            if how == "cut":
                network.cut(source, target)
            else:
                network.cut_one_way(source, target)
        for source, target in pairs:
            if network.reaches(source, target):
                raise NotFired(f"{how}: {source} still reaches {target}")
        yield f"{how} {sources} -> {targets}"


@contextmanager
def isolate(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Drop all packets from and to a host."""
    role = fault.kind.partition("-")[2]
    name = f"zk{zookeeper_nodes(context, fault)[0]}" if role == "zk-leader" else _hosts(role, fault)[0]
    with _healed(context) as network:
        network.isolate(name)
        if network.reaches(name, "redis" if name != "redis" else "zk0"):
            raise NotFired(f"{name} still reaches others")
        yield f"{name} is isolated"


@contextmanager
def throttle(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Limit the bandwidth of a server's host."""
    (name,) = _hosts("server", fault)
    with _healed(context) as network:
        network.throttle(name, _SLOW_LINK_BYTES_PER_S)
        yield f"{name} has {_SLOW_LINK_BYTES_PER_S} bytes/s"


@contextmanager
def flap(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Take the link of a server's host down for a part of each period."""
    (name,) = _hosts("server", fault)
    with (
        _healed(context) as network,
        alternating(lambda: network.isolate(name), network.heal, _FLAP_DOWN_S, _FLAP_PERIOD_S - _FLAP_DOWN_S),
    ):
        yield f"{name} flaps"


@contextmanager
def _healed(context: Context) -> Iterator[Network]:
    """The network between the hosts, without faults on leaving."""
    network = context.site.network
    assert network is not None, "this scenario's shape has hosts"
    try:
        yield network
    finally:
        network.heal()


def _proxies(context: Context, fault: ScheduledFault) -> Sequence[Proxy]:
    if not fault.kind.startswith("redis"):
        return context.site.zookeeper_proxies
    assert context.site.redis_proxy is not None, "this scenario's shape has proxies"
    return [context.site.redis_proxy]


def _hosts(role: str, fault: ScheduledFault) -> list[str]:
    match role:
        case "worker":
            return [f"worker{int(fault.pick * WORKERS)}"]
        case "server":
            return [f"server{int(fault.pick * SERVERS_HOSTED)}"]
        case "redis":
            return ["redis"]
        case _:
            return [f"zk{index}" for index in range(ZOOKEEPER_NODES)]
