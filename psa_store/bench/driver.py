"""The run: starts all contenders, lets them work in turns, checks their results, and ends them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from psa_store.bench.children import ChildProcesses
from psa_store.bench.contender import Contender
from psa_store.bench.contenders import floor, gloo, memory, psa, ray, redis_values, rpc, stream
from psa_store.bench.names import GLOO, PSA, PSA_TCP, RAY, RAY_FLAT, RPC, RPC_PIECES
from psa_store.bench.request import Bench, Carrier
from psa_store.bench.results import Comparison, Match, Series
from psa_store.bench.workload import Workload
from psa_store.launch import PrivateRedis, PrivateServers

_START_S = 60.0
_PEERS: dict[str, tuple[Callable[[], str], Callable[[Workload, ChildProcesses, Path], Contender]]] = {
    GLOO: (gloo.why_not, gloo.start),
    RPC: (rpc.why_not, rpc.start_flat),
    RPC_PIECES: (rpc.why_not, rpc.start_pieces),
    RAY: (ray.why_not, ray.start),
    RAY_FLAT: (ray.why_not, ray.start_flat),
}
"""By name: why a peer cannot take part, and how it is started."""


def run_bench(bench: Bench, say: Callable[[str], None]) -> Comparison:
    """Measure; ``say`` is told about progress, a line at a time.

    Raises:
        DependencyUnreachable: the private Redis or ZooKeeper does not start.
        UserCodeFailed: a contender died, or its parameters are not what its steps give.
    """
    absent = {name: why for name, (why_not, _) in _PEERS.items() if bench.peers and (why := why_not())}
    for name, why in absent.items():
        say(f"{name} takes no part: {why}")
    matches = tuple(
        _match(bench, Workload(bench.elements, each, bench.rule, bench.clip), say) for each in bench.workers
    )
    return Comparison(matches, absent, bench.steps)


def _match(bench: Bench, workload: Workload, say: Callable[[str], None]) -> Match:
    """One number of workers. Every second round goes the other way round."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="psa-bench-")))
        servers = stack.enter_context(closing(PrivateServers(folder / "psa")))
        redis = PrivateRedis(folder / "redis", {"appendonly": "no"})
        stack.callback(redis.stop)
        processes = stack.enter_context(closing(ChildProcesses()))  # ends before the servers that its children use

        def started(those: Iterator[Contender]) -> list[Contender]:
            ready = []
            for each in those:
                each.block(1)  # connections, first touch of memory
                say(f"{workload.workers} workers: {each.name} is ready")
                ready.append(each)
            return ready

        contenders = started(_contenders(bench, workload, folder, servers, processes))
        limits = started(_limits(workload, redis, processes)) if bench.limits else []
        turns = [*contenders, *limits]
        times_s: dict[str, list[float]] = {each.name: [] for each in turns}
        for index in range(bench.rounds):
            for each in turns[:: -1 if index % 2 else 1]:
                times_s[each.name].append(each.block(bench.steps))
            say(f"{workload.workers} workers: round {index + 1} of {bench.rounds}")
        for each in turns:
            each.check()
        for each in reversed(turns):  # one that uses what another has started leaves before it
            each.leave()
        series = {name: Series(name, tuple(each)) for name, each in times_s.items()}
        return Match(
            workload,
            contenders=tuple(series[each.name] for each in contenders),
            limits=tuple(series[each.name] for each in limits),
        )


def _contenders(
    bench: Bench, workload: Workload, folder: Path, servers: PrivateServers, processes: ChildProcesses
) -> Iterator[Contender]:
    """Start those that take steps."""
    servers.start()
    if bench.carrier is not Carrier.TCP:
        yield psa.start(workload, processes, servers.addresses, PSA, "bench-shared", "auto")
    if bench.carrier is not Carrier.SHARED:
        yield psa.start(workload, processes, servers.addresses, PSA_TCP, "bench-tcp", "tcp")
    if bench.peers:
        for why_not, start in _PEERS.values():
            if not why_not():
                yield start(workload, processes, folder)
    if bench.limits:
        yield floor.start(workload, processes)


def _limits(workload: Workload, redis: PrivateRedis, processes: ChildProcesses) -> Iterator[Contender]:
    """Start those that show what the machine can do."""
    yield memory.start(workload, processes)
    yield stream.start_one_way(workload, processes)
    yield stream.start_both_ways(workload, processes)
    redis.start(_START_S)
    yield redis_values.start_set(workload, processes, redis.url)
    yield redis_values.start_get(workload, processes, redis.url)
