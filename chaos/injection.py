"""How each kind of fault is inflicted. A injection is a context: entering injects the fault and proves it, leaving
undoes it.

What it yields is the evidence that the fault happened, taken from outside; without any it raises NotFired.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import redis

from chaos.cluster.spawner import Process as Guest
from chaos.cluster.zookeeper import NoLeader
from chaos.faults import FAULTS
from chaos.job import Job, Order, session_of, signal_if_alive, start_role
from chaos.proxy import Proxy
from chaos.schedule import ScheduledFault
from chaos.site import SERVERS_HOSTED, WORKERS, ZOOKEEPER_NODES, Site
from chaos.tail import Process, Tail, alive
from psa_store.cluster import newest_common
from psa_store.job.layout import layout_from_json
from psa_store.storage import RedisStore
from psa_store.testing.failpoints import FailpointAction, arm, disarm, hit

FIRE_WITHIN_S = 20.0
"""How long a fault that waits for something in the job may take to happen."""
_SLOW_DISK_PERIOD_S = 0.1
_FLAP_PERIOD_S = 0.15
_FLAP_DOWN_S = 0.05
_DELAY_S = 0.03
_ZK_DELAY_S = 0.1
_SLOW_LINK_BYTES_PER_S = 1_000_000
_JUMP_S = 3600
_TRIES = 5
T = TypeVar("T")
Injector = Callable[["Scene", ScheduledFault], AbstractContextManager[str]]


class NotFired(Exception):
    """The fault could not be inflicted, or there is no proof that it was."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that a injection may need."""

    site: Site
    order: Order
    job: Job
    tail: Tail
    wait: Callable[[float], None]
    """Let the run go on for so many seconds; raises when the run is over its time."""
    until: Callable[[Callable[[], T | None], float, str], T]
    """Let the run go on until something is there; raises NotFired with the text after so many seconds."""
    guests: list[Guest]
    """Processes that a fault has started besides the job; they are ended after the run."""


@contextmanager
def injection(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    """Inflict a fault; yields the evidence, and undoes on leaving what must be undone."""
    with _strike_of(planned.kind)(scene, planned) as evidence:
        yield evidence


def prepare(scene: Scene, planned: ScheduledFault) -> None:
    """Set a fault that must be there before the job is started."""
    how, _, name = planned.kind.partition("-")
    arm(scene.order.failpoints, name, FailpointAction.KILL if how == "die" else FailpointAction.STOP, planned.number)


def _strike_of(kind: str) -> Injector:
    if kind in _INJECTORS:
        return _INJECTORS[kind]
    return _BY_PREFIX[kind.partition("-")[0]]


# --- processes


def _choose(candidates: Sequence[T], planned: ScheduledFault, what: str) -> T:
    if not candidates:
        raise NotFired(f"there was no {what} to injection")
    return candidates[int(planned.pick * len(candidates))]


def _living(scene: Scene, role: str) -> list[Process]:
    """The processes of a role; waits for one, because a fault before this one may have just killed them."""

    def look() -> list[Process] | None:
        scene.tail.look()
        return scene.tail.living(role) or None

    return scene.until(look, FIRE_WITHIN_S, f"there was no {role} to injection")


def _controller(scene: Scene) -> Process:
    def look() -> Process | None:
        scene.tail.look()
        return scene.tail.controller()

    return scene.until(look, FIRE_WITHIN_S, "there was no controller to injection")


def _kill(pids: Sequence[int]) -> str:
    killed = [pid for pid in pids if signal_if_alive(pid, signal.SIGKILL)]
    if not killed:
        raise NotFired(f"the processes {list(pids)} had ended already")
    return f"SIGKILL to {killed}"


def _victims(scene: Scene, planned: ScheduledFault) -> list[int]:
    match planned.kind.partition("-")[2]:
        case "controller":
            return [_controller(scene).pid]
        case "all-workers":
            return [each.pid for each in _living(scene, "worker")]
        case "all-servers":
            return [each.pid for each in _living(scene, "server")]
        case role:
            return [_choose(_living(scene, role), planned, role).pid]


@contextmanager
def _kill_processes(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    yield _kill(_victims(scene, planned))


@contextmanager
def _stop_processes(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    pids = _victims(scene, planned)
    with _stopped(pids) as evidence:
        yield evidence


@contextmanager
def _stopped(pids: Sequence[int]) -> Iterator[str]:
    try:
        if not [pid for pid in pids if signal_if_alive(pid, signal.SIGSTOP)]:
            raise NotFired(f"the processes {list(pids)} had ended already")
        yield f"SIGSTOP to {list(pids)}"
    finally:
        for pid in pids:
            signal_if_alive(pid, signal.SIGCONT)


@contextmanager
def _stop_run(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    main = scene.job.main_pid()
    if main is None:
        raise NotFired("there was no `psa run` to stop")
    with _stopped(session_of(main)) as evidence:
        yield evidence


@contextmanager
def _kill_run(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    """Only `psa run` itself is killed: its children must notice, and end; then the same command again."""
    main = scene.job.main_pid()
    if main is None:
        raise NotFired("there was no `psa run` to kill")
    children = scene.job.kill_main()
    scene.until(
        lambda: True if not any(alive(child) for child in children) else None,
        FIRE_WITHIN_S,
        f"children of a killed `psa run` live on: {children}",
    )
    yield f"SIGKILL to `psa run`, pid {main}"
    scene.job.start()


@contextmanager
def _kill_everything(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    scene.job.kill()
    scene.site.redis.kill()
    for node in range(ZOOKEEPER_NODES):
        scene.site.zookeeper.kill(node)
    yield "SIGKILL to the job, Redis and ZooKeeper"
    scene.site.redis.start()
    scene.site.zookeeper.start()
    scene.job.start()


# --- ZooKeeper and Redis as processes


def _zookeeper_nodes(scene: Scene, planned: ScheduledFault) -> list[int]:
    def leader() -> int | None:
        try:
            return scene.site.zookeeper.leader()
        except NoLeader:
            return None

    leading = scene.until(leader, FIRE_WITHIN_S, "ZooKeeper had no leader to injection")
    followers = [node for node in range(ZOOKEEPER_NODES) if node != leading]
    match planned.kind.rpartition("-")[2]:
        case "leader":
            return [leading]
        case "follower":
            return [_choose(followers, planned, "follower")]
        case _:
            return [leading, _choose(followers, planned, "follower")]


@contextmanager
def _kill_zookeeper(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    nodes = _zookeeper_nodes(scene, planned)
    pids = [scene.site.zookeeper.pid(node) for node in nodes]
    for node in nodes:
        scene.site.zookeeper.kill(node)
    yield f"SIGKILL to ZooKeeper nodes {nodes}, pids {pids}"
    scene.site.zookeeper.start()


@contextmanager
def _stop_zookeeper(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    (node,) = _zookeeper_nodes(scene, planned)
    with _stopped([scene.site.zookeeper.pid(node)]) as evidence:
        yield f"{evidence}, ZooKeeper node {node}"


@contextmanager
def _wipe_zookeeper(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    def count() -> int | None:
        try:
            return scene.site.zookeeper.znodes()
        except NoLeader:
            return None  # a busy machine, or an election

    before = scene.until(count, FIRE_WITHIN_S, "no ZooKeeper node told how many znodes it has")
    scene.site.zookeeper.wipe()
    yield f"{before} znodes are gone"
    scene.site.zookeeper.start()


@contextmanager
def _kill_redis(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    pid = scene.site.redis.pid
    scene.site.redis.kill()
    yield f"SIGKILL to Redis, pid {pid}"
    scene.site.redis.start()


@contextmanager
def _stop_redis(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    with _stopped([scene.site.redis.pid]) as evidence:
        yield evidence


# --- failpoints


@contextmanager
def _failpoint(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    how, _, name = planned.kind.partition("-")
    folder = scene.order.failpoints
    if not FAULTS[planned.kind].at_start:
        arm(folder, name, FailpointAction.KILL if how == "die" else FailpointAction.STOP, planned.number)
    extra = _provoke(scene, planned, name)

    def reached() -> int | None:
        return next(iter(hit(folder, name)), None)

    try:
        pid = scene.until(reached, FIRE_WITHIN_S, f"nobody reached the failpoint {name}")
    except NotFired:
        disarm(folder, name)
        raise
    try:
        yield f"process {pid} reached {name}" + extra
    finally:
        signal_if_alive(pid, signal.SIGCONT)


def _provoke(scene: Scene, planned: ScheduledFault, name: str) -> str:
    """Make the job do what the failpoint is about, if it does not do so all the time."""
    room = name.partition(".")[0]
    if room == "takeover":
        others = [each for each in _living(scene, "server") if each != scene.tail.controller()]
        return "; to provoke it, " + _kill([_choose(others, planned, "second server").pid])
    if room == "serve":
        return "; to provoke it, " + _kill([_choose(_living(scene, "server"), planned, "server").pid])
    if name == "worker.loaded":
        return "; to provoke it, " + _kill([_choose(_living(scene, "worker"), planned, "worker").pid])
    if room == "handover":
        scene.guests.append(start_role(scene.site, scene.order, "server-more", {}))
        return "; to provoke it, a server joined"
    return ""


# --- data


def _client(scene: Scene) -> redis.Redis:
    return redis.Redis.from_url(scene.site.redis.url, socket_timeout=5.0)


@contextmanager
def _wipe_redis(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    with _client(scene) as client:
        before = client.dbsize()
        client.flushall()
    yield f"{before} keys are gone"


@contextmanager
def _flush_functions(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    with _client(scene) as client:
        known = len(client.function_list())
        client.function_flush()
        if not known:
            raise NotFired("Redis had no functions")
    yield f"{known} library flushed"


@contextmanager
def _damage_value(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    """Flip a bit of the version that a take-over would begin with, and kill all servers; a server must find it."""
    job = scene.order.name
    with _client(scene) as client, closing(RedisStore(scene.site.redis.url, timeout_s=5.0)) as store:
        found = store.read_job(job)
        if found is None:
            raise NotFired("the job is not stored")
        versioned = [shard.index for shard in layout_from_json(found[1]).versioned]

        def newest() -> int | None:
            heads = store.heads(job, versioned)
            return newest_common({head.shard: [each.version for each in head.manifests] for head in heads})

        for _ in range(_TRIES):
            version = newest()
            (head,) = store.heads(job, [_choose(versioned, planned, "shard")])
            manifest = head.manifest(-1 if version is None else version)
            if manifest is None:
                continue
            key = manifest.chunk_keys(job, head.shard)[0]
            at = planned.number % manifest.sections[0].size_bytes
            (byte,) = client.getrange(key, at, at)
            client.setrange(key, at, bytes([byte ^ 0x10]))
            killed = _kill([each.pid for each in _living(scene, "server")])
            if newest() == version:
                break  # else a commit was faster, and nobody will read what we have damaged
        else:
            raise NotFired("there was a newer version each time that one was damaged")

    def noticed() -> bool | None:
        scene.tail.look()
        return True if scene.tail.marked_corrupt else None

    scene.until(noticed, FIRE_WITHIN_S, f"nobody noticed that {key} is damaged")
    yield f"bit flipped in {key} at {at}; {killed}; a server put version {version} aside"


@contextmanager
def _redis_memory_limit(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    with _client(scene) as client:
        client.config_set("maxmemory", "1mb")
        try:
            try:
                client.set("chaos:full", b"x" * 1024)
            except redis.exceptions.OutOfMemoryError as error:
                yield str(error)
            else:
                raise NotFired("Redis took a value beyond its memory limit")
        finally:
            client.config_set("maxmemory", "0")
            client.delete("chaos:full")


@contextmanager
def _redis_disk_full(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    scene.site.redis.fill_disk()
    try:

        def refused() -> str | None:
            with _client(scene) as client:
                try:
                    client.set("chaos:full", b"x" * 1024)
                except redis.exceptions.RedisError as error:
                    return str(error) if "MISCONF" in str(error) or "No space" in str(error) else None
            return None

        yield scene.until(refused, FIRE_WITHIN_S, "Redis went on writing to a full disk")
    finally:
        scene.site.redis.free_disk()


@contextmanager
def _redis_disk_slow(scene: Scene, _planned: ScheduledFault) -> Iterator[str]:
    pid = scene.site.redis.pid
    with _alternating(
        lambda: signal_if_alive(pid, signal.SIGSTOP),
        lambda: signal_if_alive(pid, signal.SIGCONT),
        _SLOW_DISK_PERIOD_S / 2,
        _SLOW_DISK_PERIOD_S / 2,
    ):
        yield f"SIGSTOP and SIGCONT to Redis, pid {pid}, in turns"


@contextmanager
def _alternating(on: Callable[[], object], off: Callable[[], object], on_s: float, off_s: float) -> Iterator[None]:
    ended = threading.Event()

    def alternate() -> None:
        while not ended.is_set():
            on()
            ended.wait(on_s)
            off()
            ended.wait(off_s)

    with ThreadPoolExecutor(1, thread_name_prefix="chaos-alternating") as pool:
        alternating = pool.submit(alternate)
        try:
            yield
        finally:
            ended.set()
            alternating.result()


@contextmanager
def _clock_jump(_scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    jump_s = _JUMP_S if planned.number else -_JUMP_S
    _shift_clock(jump_s)
    try:
        yield f"CLOCK_REALTIME moved by {jump_s} s"
    finally:
        _shift_clock(-jump_s)


def _shift_clock(by_s: float) -> None:
    try:
        time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + by_s)
    except PermissionError as error:
        raise NotFired("the clock of this machine may not be set") from error


# --- links


def _redis_proxy(scene: Scene) -> Proxy:
    proxy = scene.site.redis_proxy
    assert proxy is not None, "this scenario's shape has proxies"
    return proxy


@contextmanager
def _torn(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    proxies = [_redis_proxy(scene)] if planned.kind.startswith("redis") else list(scene.site.zookeeper_proxies)
    before = sum(proxy.fired for proxy in proxies)
    for proxy in proxies:
        if planned.kind.endswith("reply"):
            proxy.cut_answers_after(planned.number)
        else:
            proxy.cut_requests_after(planned.number)
    scene.until(
        lambda: True if sum(proxy.fired for proxy in proxies) > before else None,
        FIRE_WITHIN_S,
        "nothing passed that could be torn",
    )
    yield f"torn after {planned.number} bytes"
    for proxy in proxies:
        proxy.pass_all()


@contextmanager
def _link(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    """Delay, throttle, stall or refuse what passes the proxies."""
    what = planned.kind.partition("-")[2]
    proxies = [_redis_proxy(scene)] if planned.kind.startswith("redis") else list(scene.site.zookeeper_proxies)
    for proxy in proxies:
        match what:
            case "delay":
                proxy.delay(_DELAY_S if planned.kind.startswith("redis") else _ZK_DELAY_S)
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


# --- networks


def _hosts(role: str, planned: ScheduledFault) -> list[str]:
    match role:
        case "worker":
            return [f"worker{int(planned.pick * WORKERS)}"]
        case "server":
            return [f"server{int(planned.pick * SERVERS_HOSTED)}"]
        case "redis":
            return ["redis"]
        case _:
            return [f"zk{index}" for index in range(ZOOKEEPER_NODES)]


@contextmanager
def _cut(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    network = scene.site.network
    assert network is not None, "this scenario's shape has hosts"
    how, one, other = planned.kind.split("-")
    sources, targets = _hosts(one, planned), _hosts(other, planned)
    if one == other:
        targets = [f"server{(int(sources[0].removeprefix('server')) + 1) % SERVERS_HOSTED}"]
    for source in sources:
        for target in targets:
            if how == "cut":
                network.cut(source, target)
            else:
                network.cut_one_way(source, target)
    try:
        for source in sources:
            for target in targets:
                if network.reaches(source, target):
                    raise NotFired(f"{how}: {source} still reaches {target}")
        yield f"{how} {sources} -> {targets}"
    finally:
        network.heal()


@contextmanager
def _isolate(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    network = scene.site.network
    assert network is not None, "this scenario's shape has hosts"
    role = planned.kind.partition("-")[2]
    name = f"zk{_zookeeper_nodes(scene, planned)[0]}" if role == "zk-leader" else _hosts(role, planned)[0]
    network.isolate(name)
    try:
        if network.reaches(name, "redis" if name != "redis" else "zk0"):
            raise NotFired(f"{name} still reaches others")
        yield f"{name} is isolated"
    finally:
        network.heal()


@contextmanager
def _throttle(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    network = scene.site.network
    assert network is not None, "this scenario's shape has hosts"
    (name,) = _hosts("server", planned)
    network.throttle(name, _SLOW_LINK_BYTES_PER_S)
    try:
        yield f"{name} has {_SLOW_LINK_BYTES_PER_S} bytes/s"
    finally:
        network.heal()


@contextmanager
def _flap(scene: Scene, planned: ScheduledFault) -> Iterator[str]:
    network = scene.site.network
    assert network is not None, "this scenario's shape has hosts"
    (name,) = _hosts("server", planned)
    try:
        with _alternating(lambda: network.isolate(name), network.heal, _FLAP_DOWN_S, _FLAP_PERIOD_S - _FLAP_DOWN_S):
            yield f"{name} flaps"
    finally:
        network.heal()


_INJECTORS = {
    "kill-run": _kill_run,
    "kill-redis": _kill_redis,
    "kill-redis-briefly": _kill_redis,
    "kill-zk-follower": _kill_zookeeper,
    "kill-zk-leader": _kill_zookeeper,
    "kill-zk-quorum": _kill_zookeeper,
    "kill-everything": _kill_everything,
    "stop-run": _stop_run,
    "stop-redis": _stop_redis,
    "stop-zk-follower": _stop_zookeeper,
    "stop-zk-leader": _stop_zookeeper,
    "wipe-redis": _wipe_redis,
    "wipe-zookeeper": _wipe_zookeeper,
    "damage-value": _damage_value,
    "flush-functions": _flush_functions,
    "redis-memory-limit": _redis_memory_limit,
    "redis-disk-full": _redis_disk_full,
    "redis-disk-slow": _redis_disk_slow,
    "redis-torn-reply": _torn,
    "redis-torn-request": _torn,
    "zk-torn-reply": _torn,
    "clock-jump": _clock_jump,
}
_BY_PREFIX = {
    "kill": _kill_processes,
    "stop": _stop_processes,
    "die": _failpoint,
    "hang": _failpoint,
    "redis": _link,
    "zk": _link,
    "cut": _cut,
    "mute": _cut,
    "isolate": _isolate,
    "throttle": _throttle,
    "flap": _flap,
}
"""By the first word of a kind, for those that have no injection of their own."""
