"""Faults that other programs make of themselves: they write over what a job keeps, or connect to its servers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import redis

from chaos.faults import NEIGHBOURS_WRITE
from chaos.inject.context import FIRE_WITHIN_S, Context, NotFired, choose, kill, living
from chaos.neighbour import WRITTEN_AGAIN, RedisNeighbour, ZooKeeperNeighbour, in_form, plain_client
from chaos.schedule import ScheduledFault
from psa_store.cluster import Server, plan_from_json
from psa_store.errors import DataIntegrity, Disconnected, Unproved
from psa_store.storage import RedisStore
from psa_store.wire import Door, Role, connect, host_identity

_ANSWER_S = 5.0
_REFUSED_WITHIN_S = 120.0
_CONNECTIONS = 400
_HALF_AN_OPENING = bytes(5)
_NO_OPENING = bytes(1024)
_ANOTHER_KEY = b"another key that is long enough"


@contextmanager
def write_over_znodes(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Write over each znode of the job, one after the other; each is written again, or goes with its owner."""
    form = NEIGHBOURS_WRITE[fault.number]
    done = []
    with _znodes(context) as neighbour:
        earlier = {path: neighbour.text(path) for path in neighbour.znodes()}
        provoked = _change_znodes(context, fault, neighbour) if form == "earlier" else ""
        for path, before in earlier.items():
            now = neighbour.text(path)
            if now is None:
                continue
            if form == "gone":
                neighbour.delete(path)
                unwanted = None
            else:
                unwanted = before if form == "earlier" else in_form(form, now)
                if unwanted in (None, now) or not neighbour.write(path, unwanted or b""):
                    continue
            done.append(path.removeprefix(neighbour.root))
            if unwanted is not None or path.rpartition("/")[2] in WRITTEN_AGAIN:
                context.until(_other(neighbour, path, unwanted), FIRE_WITHIN_S, f"{path} stays as it is: {form}")
    if not done:
        raise NotFired(f"no znode could be written over: {form}")
    yield f"{form}: {', '.join(done)}{provoked}"


def _other(neighbour: ZooKeeperNeighbour, path: str, unwanted: bytes | None) -> Callable[[], bool | None]:
    return lambda: neighbour.text(path) != unwanted or None


def _change_znodes(context: Context, fault: ScheduledFault, neighbour: ZooKeeperNeighbour) -> str:
    """Have a term end, so that what stands there is not what stood there before."""
    plan = f"{neighbour.root}/plan"
    before = neighbour.text(plan)
    killed = kill([choose(living(context, "server"), fault, "server").pid])
    context.until(_other(neighbour, plan, before), FIRE_WITHIN_S, "no term began")
    return f"; to have another plan before, {killed}"


@contextmanager
def write_over_documents(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Write over the job's keys in Redis, but for values; all of them become whole again."""
    form, job = NEIGHBOURS_WRITE[fault.number], context.spec.name
    url = context.site.redis.url
    with (
        redis.Redis.from_url(url, socket_timeout=_ANSWER_S) as client,
        closing(RedisStore(url, timeout_s=_ANSWER_S)) as store,
    ):
        neighbour = RedisNeighbour(client, store, job)
        if form == "earlier":
            earlier = neighbour.stored()
            context.tail.look()
            committed = context.tail.committed
            context.until(lambda: _looked(context) > committed or None, FIRE_WITHIN_S, "no version was committed")
            neighbour.restore(earlier)
        else:
            neighbour.write_over(form, values=False)
        context.until(lambda: not neighbour.problem() or None, FIRE_WITHIN_S, f"{form}: keys do not become whole")
    yield f"{form}: {neighbour.overwritten} keys, whole again"


def _looked(context: Context) -> int:
    context.tail.look()
    return context.tail.committed


@contextmanager
def say_nothing(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Connect often to each server, by each carrier; half say nothing, half stop in the middle of the opening."""
    servers = _servers(context)
    with ExitStack() as kept:
        for number in range(_CONNECTIONS):
            server = servers[number // 2 % len(servers)]
            sock = kept.enter_context(socket.socket(socket.AF_UNIX if number % 2 else socket.AF_INET))
            sock.settimeout(_ANSWER_S)
            host, _, port = server.address.rpartition(":")
            sock.connect("\0" + server.local if number % 2 else (host, int(port)))
            with suppress(OSError):  # among many, the oldest are closed
                sock.sendall(_HALF_AN_OPENING * (number // 2 % 2))
        yield f"{_CONNECTIONS} connections to {len(servers)} servers"


@contextmanager
def want_in(context: Context, fault: ScheduledFault) -> Iterator[str]:
    """Ask to be let in as a worker and as a server, with another key and with none."""
    refused = 0
    for server in _servers(context):
        for role in (Role.WORKER, Role.SERVER):
            for key in (_ANOTHER_KEY, None):
                door = Door(context.spec.name, key)
                try:
                    with connect(server.address, server.local, host_identity(), _ANSWER_S, door, role) as sock:
                        if key is not None:
                            raise NotFired(f"{server.id} let a peer with another key in")
                        sock.settimeout(_REFUSED_WITHIN_S)
                        sock.sendall(_NO_OPENING)
                        while sock.recv(1024):
                            pass
                except (Unproved, Disconnected, ConnectionError):
                    pass
                refused += 1
    yield f"{refused} peers were refused"


def _servers(context: Context) -> list[Server]:
    """Those of the newest plan."""
    with _znodes(context) as neighbour:

        def planned() -> list[Server] | None:
            with suppress(DataIntegrity):
                return list(plan_from_json((neighbour.text(f"{neighbour.root}/plan") or b"").decode()).servers) or None
            return None

        return context.until(planned, FIRE_WITHIN_S, "no plan names a server")


@contextmanager
def _znodes(context: Context) -> Iterator[ZooKeeperNeighbour]:
    client = plain_client(context.site.zookeeper.hosts)
    client.start()
    try:
        yield ZooKeeperNeighbour(client, context.spec.name)
    finally:
        client.stop()
        client.close()
