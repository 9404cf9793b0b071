"""The kinds of faults, as data: what each is and how long it lasts. ``chaos.inject`` injects them."""

from __future__ import annotations

from dataclasses import dataclass

from psa_store.testing.failpoints import FAILPOINTS


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One kind of fault."""

    kind: str
    what: str
    """What happens, for people."""
    lasts_s: tuple[float, float] = (0.0, 0.0)
    """The range from which its duration is drawn; 0 for a fault without duration."""
    numbers: tuple[int, int] = (0, 1)
    """The range from which its number is drawn."""
    at_start: bool = False
    """It must be set before the job is started."""
    loses_data: bool = False
    """It takes from Redis what was durable there: to lose more than the last commit is no failure then."""


_PAUSE_S = (0.5, 7.0)
"""Around the session timeout of 4 s: some pauses are noticed by ZooKeeper, some are not."""
_OUTAGE_S = (0.2, 3.0)
_CUT_S = (0.5, 8.0)


def _process_faults() -> list[FaultKind]:
    return [
        FaultKind("kill-worker", "SIGKILL of a worker"),
        FaultKind("kill-server", "SIGKILL of a server"),
        FaultKind("kill-controller", "SIGKILL of the server that is controller"),
        FaultKind("kill-all-workers", "SIGKILL of all workers at once"),
        FaultKind("kill-all-servers", "SIGKILL of all servers at once"),
        FaultKind("kill-run", "SIGKILL of `psa run`; its children end with it; the same command again", (0.0, 1.0)),
        FaultKind("kill-redis", "SIGKILL of Redis, started again", _OUTAGE_S),
        FaultKind("kill-redis-briefly", "SIGKILL of Redis, back before the next commit is due", (0.2, 1.0)),
        FaultKind("kill-zk-follower", "SIGKILL of a ZooKeeper follower, started again", _OUTAGE_S),
        FaultKind("kill-zk-leader", "SIGKILL of the ZooKeeper leader, started again", _OUTAGE_S),
        FaultKind("kill-zk-quorum", "SIGKILL of two of three ZooKeeper nodes, started again", (0.2, 6.0)),
        FaultKind("kill-everything", "SIGKILL of all: run, Redis, ZooKeeper; all started again", (0.0, 1.0)),
        FaultKind("kill-starting-worker", "SIGKILL of a worker, and of the one in its place when that has begun"),
        FaultKind("kill-starting-server", "SIGKILL of a server, and of the one in its place when that has begun"),
        FaultKind("stop-worker", "SIGSTOP of a worker, SIGCONT", _PAUSE_S),
        FaultKind("stop-server", "SIGSTOP of a server, SIGCONT", _PAUSE_S),
        FaultKind("stop-controller", "SIGSTOP of the controller, SIGCONT", _PAUSE_S),
        FaultKind("stop-run", "SIGSTOP of `psa run` and all its children, SIGCONT", _PAUSE_S),
        FaultKind("stop-everything", "SIGSTOP of run, Redis and ZooKeeper, as of a suspended machine", _PAUSE_S),
        FaultKind("stop-redis", "SIGSTOP of Redis, SIGCONT", _PAUSE_S),
        FaultKind("stop-zk-follower", "SIGSTOP of a ZooKeeper follower, SIGCONT", _PAUSE_S),
        FaultKind("stop-zk-leader", "SIGSTOP of the ZooKeeper leader, SIGCONT", _PAUSE_S),
    ]


NOT_IN_TRAINING = ("barrier", "fork", "rollback")
"""Groups of failpoints that a job does not pass by itself: chaos/barrier and tests/kill/test_checkpoints hit them."""


def _failpoint_faults() -> list[FaultKind]:
    found = []
    for name, where in FAILPOINTS.items():
        room = name.partition(".")[0]
        if room in NOT_IN_TRAINING:
            continue
        numbers = {"commit.chunk": (1, 6), "push.middle": (0, 4), "cell.backward": (0, 2)}.get(name, (0, 1))
        start = room == "create"
        found.append(FaultKind(f"die-{name}", f"SIGKILL where {where}", numbers=numbers, at_start=start))
        found.append(FaultKind(f"hang-{name}", f"SIGSTOP where {where}; SIGCONT", _PAUSE_S, numbers, at_start=start))
    return found


def _data_faults() -> list[FaultKind]:
    return [
        FaultKind("wipe-redis", "FLUSHALL while the job runs", loses_data=True),
        FaultKind("wipe-zookeeper", "all ZooKeeper nodes lose their data and come back empty", _OUTAGE_S),
        FaultKind(
            "damage-value", "a bit of a stored chunk flips, then all servers die", numbers=(0, 1 << 20), loses_data=True
        ),
        FaultKind("flush-functions", "FUNCTION FLUSH"),
        FaultKind("redis-memory-limit", "Redis is at its memory limit", _OUTAGE_S),
        FaultKind("redis-disk-full", "the disk under Redis is full", (0.5, 5.0)),
        FaultKind("redis-disk-slow", "Redis is stopped for 50 of every 100 ms, as by a slow disk", (1.0, 4.0)),
        FaultKind("clock-jump", "the wall clock jumps an hour, forth or back, and returns", (0.5, 3.0), (0, 2)),
    ]


def _proxy_faults() -> list[FaultKind]:
    return [
        FaultKind("redis-torn-reply", "a reply of Redis ends at byte k, then its connection", numbers=(0, 4000)),
        FaultKind("redis-torn-request", "a request to Redis ends at byte k, then its connection", numbers=(0, 200_000)),
        FaultKind("redis-delay", "what goes to and from Redis takes 30 ms longer", (1.0, 4.0)),
        FaultKind("redis-throttle", "the link to Redis carries 1 MB/s", (1.0, 4.0)),
        FaultKind("redis-stall", "the link to Redis is silent", _CUT_S),
        FaultKind("redis-refuse", "the link to Redis refuses connections", _CUT_S),
        FaultKind("zk-torn-reply", "a reply of ZooKeeper ends at byte k, then its connection", numbers=(0, 400)),
        FaultKind("zk-delay", "what goes to and from ZooKeeper takes 100 ms longer", (1.0, 4.0)),
        FaultKind("zk-stall", "the links to all of ZooKeeper are silent", _CUT_S),
    ]


def _network_faults() -> list[FaultKind]:
    pairs = ["worker-server", "server-server", "server-redis", "server-zookeeper", "worker-zookeeper"]
    found = []
    for pair in pairs:
        one, other = pair.split("-")
        found.append(FaultKind(f"cut-{one}-{other}", f"no packet passes between a {one} and {_a(other)}", _CUT_S))
        found.append(FaultKind(f"mute-{one}-{other}", f"packets of a {one} to {_a(other)} vanish, not back", _CUT_S))
        found.append(FaultKind(f"mute-{other}-{one}", f"packets of {_a(other)} to a {one} vanish, not back", _CUT_S))
    unique = {fault.kind: fault for fault in found}
    return [
        *unique.values(),
        FaultKind("isolate-worker", "a worker's host is cut off from all others", _CUT_S),
        FaultKind("isolate-server", "a server's host is cut off from all others", _CUT_S),
        FaultKind("isolate-redis", "Redis' host is cut off from all others", _CUT_S),
        FaultKind("isolate-zk-leader", "the ZooKeeper leader's host is cut off from all others", _CUT_S),
        FaultKind("throttle-server", "a server's link carries 1 MB/s", (2.0, 5.0)),
        FaultKind(
            "flap-server", "a server's link fails for 50 of every 150 ms: packets are lost in bursts", (1.0, 4.0)
        ),
    ]


NEIGHBOURS_WRITE = ("no text", "older", "newer", "gone", "earlier")
"""By number, what stands in place of what a job wrote; "earlier": what stood there a while before."""


def _neighbour_faults() -> list[FaultKind]:
    forms = (0, len(NEIGHBOURS_WRITE))
    return [
        FaultKind(
            "neighbour-znodes",
            "each znode of the job is overwritten with garbage, another release's or an earlier text, or deleted",
            numbers=forms,
        ),
        FaultKind("neighbour-documents", "so are its documents and the heads of its shards in Redis", numbers=forms),
        FaultKind("neighbour-connections", "connections to all servers say nothing, or half of an opening", (1.0, 4.0)),
        FaultKind("neighbour-key", "peers with another key, and with none, want to be let in by all servers"),
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
        *_neighbour_faults(),
    ]
}
"""Every kind of fault by its name."""
