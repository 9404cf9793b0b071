"""What the doors cost: ``python -m tests.performance.doors [--workers 100] [--megabytes 25] [--rounds 5]``.

First, so many workers connect to one server, one after the other, and stay: from the first connection to the last
WELCOME, with a key beside without one (over a Unix socket and over TCP), and with TLS. The connections are those of
workers; the processes, which take seconds to start, are not counted. Then, a step over TCP with TLS beside plain, as
`psa bench` measures it. All in one run, in turns.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from psa_store.bench.children import ChildProcesses
from psa_store.bench.contender import Contender
from psa_store.bench.contenders import psa
from psa_store.bench.request import Rule
from psa_store.bench.workload import Workload
from psa_store.cluster import Member, ProcessRole
from psa_store.coordination import Coordination
from psa_store.job.layout import layout_from_json
from psa_store.launch import PrivateServers
from psa_store.storage import RedisStore
from psa_store.wire import Door, Header, Hello, Kind, Role, Tls, connect, encode
from psa_store.wire.frames import HEADER_BYTES, unpack

_TIMEOUT_S = 60.0


def connected(member: Member, local: bool, hello: Hello, door: Door, count: int) -> float:
    """Seconds that so many workers take to be welcomed."""
    with ExitStack() as kept:
        begin_s = time.perf_counter()
        for number in range(count):
            name = member.local if local else ""
            sock = kept.enter_context(connect(member.address, name, member.host, _TIMEOUT_S, door, Role.WORKER))
            text = encode(Hello(hello.job, hello.layout, f"worker-bench-{number}", by_reference=False))
            sock.sendall(Header(Kind.HELLO, length=len(text)).pack() + text)
            head = _exactly(sock.recv, HEADER_BYTES)
            assert unpack(head).kind is Kind.WELCOME
            _exactly(sock.recv, unpack(head).length)
        return time.perf_counter() - begin_s


def _exactly(receive: Callable[[int], bytes], count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = receive(count - len(data))
        assert part, "the server has closed the connection"
        data += part
    return data


def certificates(folder: Path) -> dict[str, str]:
    """The settings of a certificate that is its own authority."""
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*made, "-days", "2", "-subj", "/CN=psa-bench", *files], check=True, capture_output=True)
    return {
        "PSA_TLS_CERT": str(folder / "cert.pem"),
        "PSA_TLS_KEY": str(folder / "key.pem"),
        "PSA_TLS_CA": str(folder / "cert.pem"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--megabytes", type=float, default=25.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="psa-doors-")))
        servers = stack.enter_context(closing(PrivateServers(folder / "psa")))
        servers.start()
        processes = stack.enter_context(closing(ChildProcesses()))
        key = secrets.token_hex(32)
        tls_env = certificates(folder)
        tls = Tls(*(Path(tls_env[name]) for name in ("PSA_TLS_CERT", "PSA_TLS_KEY", "PSA_TLS_CA")))
        workload = Workload(round(given.megabytes * 1e6 / 4), 2, Rule.SGD, None)
        kinds: dict[str, tuple[dict[str, str], Door]] = {
            "plain": ({}, Door("doors-plain")),
            "key": ({"PSA_KEY": key}, Door("doors-key", key.encode())),
            "key-and-tls": ({"PSA_KEY": key, **tls_env}, Door("doors-key-and-tls", key.encode(), tls)),
        }
        contenders: dict[str, Contender] = {}
        for name, (env, door) in kinds.items():
            contenders[name] = psa.start(workload, processes, servers.addresses, name, door.job, "tcp", env)
            contenders[name].block(1)
        _connecting(servers, kinds, given.workers, given.rounds)
        times_s: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(given.rounds):
            for name, contender in contenders.items():
                times_s[name].append(contender.block(5))
        for contender in contenders.values():
            contender.check()
            contender.leave()
    print(f"a step over TCP, {given.megabytes:.0f} MB, 2 workers: median, least and most of {given.rounds} blocks")
    _table(times_s, "plain")


def _connecting(
    servers: PrivateServers, kinds: dict[str, tuple[dict[str, str], Door]], workers: int, rounds: int
) -> None:
    store = RedisStore(servers.addresses.redis, timeout_s=_TIMEOUT_S)
    found: dict[str, tuple[Member, Hello]] = {}
    for name, (_, door) in kinds.items():
        documents = store.read_job(door.job)
        assert documents is not None
        with closing(
            Coordination(
                servers.addresses.zookeeper, door.job, session_timeout_s=30.0, connect_timeout_s=30.0, wake=lambda: None
            )
        ) as coordination:
            coordination.start()
            (member,) = coordination.members(ProcessRole.SERVER).values()
        found[name] = member, Hello(door.job, layout_from_json(documents[1]).fingerprint, "")
    store.close()
    for carrier in ("Unix sockets", "TCP"):
        times_s: dict[str, list[float]] = {name: [] for name in kinds if carrier == "TCP" or "tls" not in name}
        for _ in range(rounds):
            for name, each in times_s.items():
                member, hello = found[name]
                each.append(connected(member, carrier != "TCP", hello, kinds[name][1], workers))
        print(f"{workers} workers connect over {carrier}: median, least and most of {rounds}")
        _table(times_s, "plain")


def _table(times_s: dict[str, list[float]], base: str) -> None:
    middle = {name: statistics.median(each) for name, each in times_s.items()}
    for name, each in times_s.items():
        ratio = middle[name] / middle[base]
        print(f"  {name:12} {middle[name] * 1e3:8.2f} ms  {min(each) * 1e3:8.2f} {max(each) * 1e3:8.2f}  x {ratio:.2f}")


if __name__ == "__main__":
    main()
