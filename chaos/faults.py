"""The kinds of faults, as data: what each is, which promise it attacks, how long it lasts. How is in ``injections``."""

from __future__ import annotations

from dataclasses import dataclass

from psa_store.testing.failpoints import FAILPOINTS


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault."""

    kind: str
    what: str
    """What happens, for people."""
    lasts_s: tuple[float, float] = (0.0, 0.0)
    """Between which times its length is drawn; 0 for what has no length."""
    numbers: tuple[int, int] = (0, 1)
    """From which range its number is drawn."""
    at_start: bool = False
    """It must be set before the job is started."""
    loses_data: bool = False
    """It takes from Redis what was durable there: going back further than to the last commit is no failure then."""


_PAUSE_S = (0.5, 7.0)
"""Around the session timeout of 4 s: some pauses are noticed by ZooKeeper, some are not."""
_OUTAGE_S = (0.2, 3.0)
_CUT_S = (0.5, 8.0)


def _process_faults() -> list[Fault]:
    return [
        Fault("kill-worker", "SIGKILL of a worker"),
        Fault("kill-server", "SIGKILL of a server"),
        Fault("kill-controller", "SIGKILL of the server that is controller"),
        Fault("kill-all-workers", "SIGKILL of all workers at once"),
        Fault("kill-all-servers", "SIGKILL of all servers at once"),
        Fault("kill-run", "SIGKILL of `psa run`; its children end with it; the same command again", (0.0, 1.0)),
        Fault("kill-redis", "SIGKILL of Redis, started again", _OUTAGE_S),
        Fault("kill-redis-briefly", "SIGKILL of Redis, back before the next commit is due", (0.2, 1.0)),
        Fault("kill-zk-follower", "SIGKILL of a ZooKeeper follower, started again", _OUTAGE_S),
        Fault("kill-zk-leader", "SIGKILL of the ZooKeeper leader, started again", _OUTAGE_S),
        Fault("kill-zk-quorum", "SIGKILL of two of three ZooKeeper nodes, started again", (0.2, 6.0)),
        Fault("kill-everything", "SIGKILL of all: run, Redis, ZooKeeper; all started again", (0.0, 1.0)),
        Fault("stop-worker", "SIGSTOP of a worker, SIGCONT", _PAUSE_S),
        Fault("stop-server", "SIGSTOP of a server, SIGCONT", _PAUSE_S),
        Fault("stop-controller", "SIGSTOP of the controller, SIGCONT", _PAUSE_S),
        Fault("stop-run", "SIGSTOP of `psa run` and all its children, SIGCONT", _PAUSE_S),
        Fault("stop-redis", "SIGSTOP of Redis, SIGCONT", _PAUSE_S),
        Fault("stop-zk-follower", "SIGSTOP of a ZooKeeper follower, SIGCONT", _PAUSE_S),
        Fault("stop-zk-leader", "SIGSTOP of the ZooKeeper leader, SIGCONT", _PAUSE_S),
    ]


NOT_IN_TRAINING = ("barrier", "fork", "rollback")
"""Rooms of failpoints that a job does not pass by itself: chaos/barrier and tests/kill/test_checkpoints play them."""


def _failpoint_faults() -> list[Fault]:
    found = []
    for name, where in FAILPOINTS.items():
        room = name.partition(".")[0]
        if room in NOT_IN_TRAINING:
            continue
        numbers = {"commit.chunk": (1, 6), "push.middle": (0, 4)}.get(name, (0, 1))
        start = room == "create"
        found.append(Fault(f"die-{name}", f"SIGKILL where {where}", numbers=numbers, at_start=start))
        found.append(Fault(f"hang-{name}", f"SIGSTOP where {where}; SIGCONT", _PAUSE_S, numbers, at_start=start))
    return found


def _data_faults() -> list[Fault]:
    return [
        Fault("wipe-redis", "FLUSHALL while the job runs", loses_data=True),
        Fault("wipe-zookeeper", "all ZooKeeper nodes lose their data and come back empty", _OUTAGE_S),
        Fault("damage-value", "a bit of a stored chunk flips, then all servers die", loses_data=True),
        Fault("flush-functions", "FUNCTION FLUSH"),
        Fault("redis-memory-limit", "Redis is at its memory limit", _OUTAGE_S),
        Fault("redis-disk-full", "the disk under Redis is full", (0.5, 5.0)),
        Fault("redis-disk-slow", "Redis stands still for 50 of every 100 ms, as behind a slow disk", (1.0, 4.0)),
        Fault("clock-jump", "the wall clock jumps an hour, forth or back, and returns", (0.5, 3.0), (0, 2)),
    ]


def _proxy_faults() -> list[Fault]:
    return [
        Fault("redis-torn-reply", "a reply of Redis ends at byte k, then its connection", numbers=(0, 4000)),
        Fault("redis-torn-request", "a request to Redis ends at byte k, then its connection", numbers=(0, 200_000)),
        Fault("redis-delay", "what goes to and from Redis takes 30 ms longer", (1.0, 4.0)),
        Fault("redis-throttle", "the link to Redis carries 1 MB/s", (1.0, 4.0)),
        Fault("redis-stall", "the link to Redis is silent", _CUT_S),
        Fault("redis-refuse", "the link to Redis refuses connections", _CUT_S),
        Fault("zk-torn-reply", "a reply of ZooKeeper ends at byte k, then its connection", numbers=(0, 400)),
        Fault("zk-delay", "what goes to and from ZooKeeper takes 100 ms longer", (1.0, 4.0)),
        Fault("zk-stall", "the links to all of ZooKeeper are silent", _CUT_S),
    ]


def _network_faults() -> list[Fault]:
    pairs = ["worker-server", "server-server", "server-redis", "server-zookeeper", "worker-zookeeper"]
    found = []
    for pair in pairs:
        one, other = pair.split("-")
        found.append(Fault(f"cut-{one}-{other}", f"no packet passes between a {one} and {_a(other)}", _CUT_S))
        found.append(Fault(f"mute-{one}-{other}", f"packets of a {one} to {_a(other)} vanish, not back", _CUT_S))
        found.append(Fault(f"mute-{other}-{one}", f"packets of {_a(other)} to a {one} vanish, not back", _CUT_S))
    unique = {fault.kind: fault for fault in found}
    return [
        *unique.values(),
        Fault("isolate-worker", "a worker's host is cut off from everybody", _CUT_S),
        Fault("isolate-server", "a server's host is cut off from everybody", _CUT_S),
        Fault("isolate-redis", "Redis' host is cut off from everybody", _CUT_S),
        Fault("isolate-zk-leader", "the ZooKeeper leader's host is cut off from everybody", _CUT_S),
        Fault("throttle-server", "a server's link carries 1 MB/s", (2.0, 5.0)),
        Fault("flap-server", "a server's link fails for 50 of every 150 ms: packets are lost in bursts", (1.0, 4.0)),
    ]


def _a(role: str) -> str:
    return role.capitalize() if role in ("redis", "zookeeper") else f"a {role}"


FAULTS = {
    fault.kind: fault
    for fault in [
        *_process_faults(),
        *_failpoint_faults(),
        *_data_faults(),
        *_proxy_faults(),
        *_network_faults(),
    ]
}
"""Every kind of fault by its name."""
