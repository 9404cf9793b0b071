"""How long `psa status` takes: ``python -m tests.performance.status [--members 50] [--shards 1000] [--rounds 7]``.

Starts a private Redis and ZooKeeper and makes a job of so many members, half of them servers that answer as ours do,
with ephemerals in ZooKeeper, heartbeats in Redis and three committed versions of every shard. Measures one look by new
sessions, one more by the same (as with ``--watch``), and the whole command, beside `psa --help`, which only imports.
Of commands it also prints the CPU time: on a busy machine they wait for a processor for much longer. They find compiled
modules, as a command does that was run before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection as Pipe

from psa_store.cluster import Member, Plan, ProcessRole, Server
from psa_store.config import Settings
from psa_store.coordination import Coordination
from psa_store.errors import PsaError
from psa_store.job.config import JobConfig
from psa_store.job.layout import PAGE_BYTES, TensorRole, TensorSpec, make_layout
from psa_store.observe import JobHistory
from psa_store.observe.heartbeat import Heartbeat
from psa_store.observe.status import Observer, describe
from psa_store.storage import Manifest, RedisStore, ShardState
from psa_store.wire import Connection, Header, Kind, Report, encode, host_identity, listen_tcp
from tests.performance.common import private_servers

JOB = "bench"
VERSIONS = (50, 100, 150)
TARGET_S = 1.0
_HELLO_S = 30.0
_TIMEOUT_S = 30.0


def answer_for(servers: int, pipe: Pipe) -> None:
    """Answer INSPECT at so many addresses, which are sent through the pipe, until the pipe closes."""
    with selectors.DefaultSelector() as selector:
        listening = [listen_tcp("127.0.0.1") for _ in range(servers)]
        for sock, _ in listening:
            selector.register(sock, selectors.EVENT_READ, None)
        selector.register(pipe, selectors.EVENT_READ, pipe)
        pipe.send([address for _, address in listening])
        while True:
            for key, _ in selector.select():
                if key.data is pipe:
                    return
                if key.data is None:
                    sock, _ = key.fileobj.accept()  # type: ignore[union-attr]
                    connection = Connection(sock, "client", lambda _, header: memoryview(bytearray(header.length)))
                    selector.register(connection, selectors.EVENT_READ, connection)
                    continue
                try:
                    for _ in key.data.receive():
                        text = encode(Report("server", 1, "collecting", 152, 150, 1))
                        key.data.send(Header(Kind.REPORT, length=len(text)), text)
                    key.data.flush()
                except PsaError:
                    selector.unregister(key.data)
                    key.data.close()


def make_job(stack: ExitStack, settings: Settings, addresses: list[str], workers: int, shards: int) -> None:
    """Write what a running job has in Redis and ZooKeeper; its ephemerals end with ``stack``."""
    assert settings.redis is not None and settings.zookeeper is not None
    numel = shards * PAGE_BYTES // 4
    layout = make_layout([TensorSpec(("weights",), (numel,), "float32", TensorRole.TRAINED)], PAGE_BYTES)
    servers = [Member(f"server-{i:03}", host_identity(), os.getpid(), each) for i, each in enumerate(addresses)]
    names = [f"worker-{i:03}" for i in range(workers)]
    config = JobConfig(JOB, workers, 0, {"name": "sgd"}, layout.fingerprint)
    with closing(RedisStore(settings.redis, timeout_s=_TIMEOUT_S)) as store:
        store.check()
        store.create_job(JOB, config.to_json(), layout.to_json())
        store.seal(JOB, range(shards), 1, layout.fingerprint)
        page = memoryview(bytes(PAGE_BYTES))
        expect = None
        for version in VERSIONS:
            states = [ShardState(i, {"param": ("float32", page)}, {"opt_step": version}, expect) for i in range(shards)]
            with closing(store.commit_each(JOB, 1, version, states, keep=len(VERSIONS))) as outcomes:
                assert all(isinstance(outcome, Manifest) for _, outcome in outcomes)
            expect = version
    plan = Plan(
        term=1,
        revision=1,
        resume=0,
        servers=tuple(Server(each.id, each.address, "", each.host) for each in servers),
        owners=tuple(shard * len(servers) // shards for shard in range(shards)),
        cells=tuple(names),
    )
    members = [(ProcessRole.SERVER, each) for each in servers]
    members += [(ProcessRole.WORKER, Member(each, host_identity(), os.getpid())) for each in names]
    for kind, member in members:
        coordination = Coordination(
            settings.zookeeper, JOB, session_timeout_s=60.0, connect_timeout_s=_TIMEOUT_S, wake=lambda: None
        )
        stack.callback(coordination.close)
        coordination.start()
        coordination.join(kind, member)
        if kind is ProcessRole.SERVER:
            coordination.campaign(member.id)
    coordination.create_config(config)
    coordination.write_plan(plan, None)


def beat(settings: Settings, servers: int, workers: int) -> None:
    """Write a fresh heartbeat of every member."""
    assert settings.redis is not None
    with closing(JobHistory(JOB, settings.redis, timeout_s=_TIMEOUT_S)) as history:
        for role, count in ((ProcessRole.SERVER, servers), (ProcessRole.WORKER, workers)):
            for i in range(count):
                history.beat(_heartbeat(role, i))


def _heartbeat(role: ProcessRole, number: int) -> Heartbeat:
    computes = role is ProcessRole.WORKER
    return Heartbeat(
        member=f"{role}-{number:03}",
        role=role,
        time=time.time(),
        host=host_identity(),
        pid=os.getpid(),
        resident_bytes=1 << 28,
        stage="computing",
        ranks=(number,) if computes else (),
        steps_per_s=10.0,
        samples_per_s=120.0,
        metrics={"step": 152, "loss": 1.5} if computes else {"version": 152, "committed_version": 150},
    )


def _timed(action: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


def _command(environment: dict[str, str], *arguments: str) -> tuple[float, float]:
    """Run a `psa` command; return its wall time and its CPU time."""
    command = [sys.executable, "-m", "psa_store.cli", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    took_s = _timed(
        lambda: subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=_TIMEOUT_S)
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return took_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(
    settings: Settings, environment: dict[str, str], servers: int, workers: int, rounds: int
) -> dict[str, list[float]]:
    """Measure; return the seconds of each kind of look, by round."""
    assert settings.redis is not None
    _command(environment, "status", JOB)
    took_s: dict[str, list[float]] = {"describe()": [], "the next look": []}
    took_s |= {f"{command}{what}": [] for command in ("psa --help", "psa status JOB") for what in ("", ", CPU")}
    with (
        closing(RedisStore(settings.redis, timeout_s=_TIMEOUT_S)) as store,
        closing(Observer(JOB, settings, store)) as observer,
    ):
        for _ in range(rounds):
            beat(settings, servers, workers)
            status = observer.look()
            assert len(status.servers) == servers and len(status.workers) == workers
            assert status.committed == VERSIONS[-1] and not status.findings, status.findings
            took_s["the next look"].append(_timed(observer.look))
            took_s["describe()"].append(_timed(lambda: describe(JOB, settings, store)))
            for command, arguments in (("psa --help", ["--help"]), ("psa status JOB", ["status", JOB])):
                passed_s, used_s = _command(environment, *arguments)
                took_s[command].append(passed_s)
                took_s[f"{command}, CPU"].append(used_s)
    return took_s


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--members", type=int, default=50, help="half of them servers")
    options.add_argument("--shards", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=7)
    args = options.parse_args()
    servers, workers = args.members // 2, args.members - args.members // 2
    with private_servers() as private, ExitStack() as stack:
        settings = private.settings
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        answering = multiprocessing.get_context("spawn").Process(target=answer_for, args=(servers, theirs))
        answering.start()
        stack.callback(answering.join, _HELLO_S)
        stack.callback(ours.close)
        theirs.close()
        if not ours.poll(_HELLO_S):
            raise SystemExit("the process that plays the servers did not start")
        make_job(stack, settings, ours.recv(), workers, args.shards)
        environment = private.env | {
            "PYTHONPYCACHEPREFIX": str(private.home / "compiled"),  # compiled modules even if the caller has none
            "PYTHONDONTWRITEBYTECODE": "",
        }
        took_s = measure(settings, environment, servers, workers, args.rounds)
    print(f"{servers} servers, {workers} workers, {args.shards} shards, {args.rounds} rounds")
    print(f"{'':19} median  quartiles   seconds")
    for name, each in took_s.items():
        low, middle, high = statistics.quantiles(each, n=4)
        aim = f"   (aim: at most {TARGET_S:g})" if name == "psa status JOB" else ""
        print(f"{name:19} {middle:6.3f}  {low:.3f} to {high:.3f}{aim}")


if __name__ == "__main__":
    main()
