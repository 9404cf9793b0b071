"""A job with a key: no process enters without it, a thousand that try do no harm, and the key is to be seen nowhere.

One file, since all peers are let loose on one running job, whose result is compared at the end. Its processes may have
1,024 descriptors each.
"""

from __future__ import annotations

import os
import random
import re
import resource
import secrets
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from psa_store.errors import Unproved
from psa_store.wire import Door, Header, Hello, Kind, Role, connect, encode
from psa_store.wire.frames import HEADER_BYTES
from psa_store.wire.handshake import NONCE_BYTES, Connecting
from tests.harness import Run, Site
from tests.integration.peers import (
    PATIENCE_S,
    STEPS,
    Frame,
    Peer,
    Scene,
    holdings,
    look,
    resident_bytes,
    running,
    start,
)
from tests.unit.test_tls import authority

JOB = "key"
KEY = f"canary-{secrets.token_hex(16)}"
CARRIERS = ["unix", "tcp"]
SILENT = 1100
SILENT_LONG = 5000
STEPS_MEASURED = 400
STEP_RATIO_MAX = 1.2
MUTATED = 300
MUTATED_LONG = 1_000_000 // 3
GROWTH_BYTES_MAX = 8 << 20


@pytest.fixture(scope="module")
def run(site: Site) -> Iterator[Run]:
    with running(site, JOB, key=KEY, before=("prlimit", "--nofile=1024:1024")) as run:
        yield run


@pytest.fixture
def scene(site: Site, run: Run) -> Iterator[Scene]:
    assert run.process.poll() is None, "the job has ended: " + run.output
    with look(site, JOB, key=KEY.encode()) as scene:
        yield scene


def raw(scene: Scene, carrier: str) -> Peer:
    """A connection on which nothing has been said."""
    server = scene.servers[scene.plan.owner_of(0).id]
    return scene.peers.enter_context(closing(Peer(server, carrier, scene.job, scene.layout, scene.plan)))


def last_word(peer: Peer) -> Frame | None:
    """What the server says before it closes the connection. Over TCP it may be lost."""
    word = peer.is_closed()
    assert word is not None or peer.carrier == "tcp"
    return word


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_hello_in_a_workers_name_and_a_push_change_nothing(scene: Scene, carrier: str) -> None:
    """What any user of the machine could do: another worker's name, and a gradient that overwrites everything."""
    peer, shard = raw(scene, carrier), scene.shard()
    peer.hello(scene.plan.cells[0])
    peer.say(Kind.PUSH, np.ones(shard.size_bytes // 4, dtype="<f4").tobytes(), shard=shard.index)
    word = last_word(peer)
    assert word is None or "set PSA_KEY" in word.text["why"]
    scene.check_that_training_goes_on()


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("kind", [Kind.INSPECT, Kind.PULL])
def test_nothing_is_told_without_the_key(scene: Scene, carrier: str, kind: Kind) -> None:
    peer = raw(scene, carrier)
    peer.say(kind)
    word = last_word(peer)
    assert word is None or word.header.kind is Kind.REFUSED


def test_another_key_is_named_on_both_sides(scene: Scene, run: Run) -> None:
    server = scene.servers[scene.plan.owner_of(0).id]
    for local in (server.local, ""):
        with pytest.raises(Unproved, match=r"another key: PSA_KEY \(or PSA_KEY_FILE\)"):
            connect(server.address, local, server.host, PATIENCE_S, Door(JOB, b"another key that is"), Role.WORKER)
    run.wait_for_line(lambda line: "refused a peer" in line and "PSA_KEY" in line)
    scene.check_that_training_goes_on()


def test_a_worker_with_another_key_says_so_and_ends(site: Site, scene: Scene) -> None:
    env = {"PSA_KEY": "another key that is", "PSA_RANKS": "2"}
    script = [str(Path(__file__).parents[2] / "chaos" / "train.py"), "--job", JOB, *STEPS, "--total", "1000"]
    stranger = site.psa("worker", *script, env=env)
    stranger.wait_for_line(lambda line: "to prove the key" in line and "PSA_KEY" in line)
    assert stranger.finish() == 2, stranger.output
    assert stranger.lines[-1].startswith("psa: server ") and "PSA_KEY" in stranger.lines[-1]
    scene.check_that_training_goes_on()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_what_a_worker_said_once_is_worth_nothing_later(scene: Scene, carrier: str) -> None:
    """A peer that has overheard a connection from its first byte says all of it again."""
    overheard: list[bytes] = []
    peer = raw(scene, carrier)
    proof = Connecting(KEY.encode(), JOB, Role.WORKER, bytes(NONCE_BYTES))
    answer = exchange(peer, proof.opening)
    overheard += [proof.opening, proof.take(answer)]
    peer.throw(overheard[1])
    peer.hello("worker-overheard")
    assert peer.next_of(Kind.WELCOME)
    again = raw(scene, carrier)
    again.throw(b"".join(overheard))
    again.hello("worker-overheard")
    again.say(Kind.INSPECT)
    data = b"".join(iter(lambda: received(again), b""))
    assert len(data) <= HEADER_BYTES, "it was answered"


@pytest.mark.parametrize("carrier", CARRIERS)
def test_what_a_server_says_cannot_be_said_back_to_it(scene: Scene, carrier: str) -> None:
    peer = raw(scene, carrier)
    opening = Connecting(bytes(32), JOB, Role.WORKER, bytes(NONCE_BYTES)).opening
    peer.throw(exchange(peer, opening)[-32:])
    peer.say(Kind.INSPECT)
    assert received(peer) == b""


def test_a_server_that_has_not_got_the_key_is_found_out(scene: Scene) -> None:
    """It sends back what comes, says that it has none, or is silent; it must not learn a proof."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "{}:{}".format(*listener.getsockname())
        door = Door(JOB, KEY.encode())
        for answer in (b"", bytes(HEADER_BYTES), os.urandom(HEADER_BYTES)):
            with ExitStack() as kept:
                sock = kept.enter_context(socket.create_connection(listener.getsockname()))
                listener.accept()[0].sendall(answer) if answer else listener.accept()[0].close()
                with pytest.raises(Exception, match="server"):
                    door.enter(sock, Role.WORKER, time.monotonic() + PATIENCE_S)
        assert address


def test_those_that_are_silent_are_thrown_out_and_training_goes_on(scene: Scene, run: Run) -> None:
    """More of them than a server may have descriptors; half say nothing, half stop in the middle of the opening."""
    before = [holdings(pid) for pid in scene.pids]
    opening = Connecting(KEY.encode(), JOB, Role.WORKER, bytes(NONCE_BYTES)).opening
    server = scene.servers[scene.plan.owner_of(0).id]
    host, _, port = server.address.rpartition(":")
    with ExitStack() as kept:
        for number in range(SILENT):
            sock = kept.enter_context(socket.socket(socket.AF_INET if number % 2 else socket.AF_UNIX))
            sock.settimeout(PATIENCE_S)
            sock.connect((host, int(port)) if number % 2 else "\0" + server.local)
            if number % 4 > 1:
                try:
                    sock.sendall(opening[: number % HEADER_BYTES])
                except OSError:
                    pass  # it was among the oldest, and is closed already
        scene.check_that_training_goes_on(steps=10)  # and members are let in meanwhile
        assert holdings(server.pid).sockets_and_memory < before[scene.pids.index(server.pid)].sockets_and_memory + 200
        assert "ZooKeeper is silent" not in run.output
        run.wait_for_line(lambda line: "refused a peer" in line and "proved nothing" in line)
    refused = [line for line in run.lines if "refused a peer" in line]
    assert len(refused) < 60, "one line a second"
    assert max(int(found[1]) for line in refused if (found := re.search(r"refused=(\d+)", line))) > 100


@pytest.mark.long
@pytest.mark.timeout(900)
def test_five_thousand_silent_connections_take_no_lease_and_no_time(scene: Scene, run: Run) -> None:
    """From many addresses, while a job steps; beside as many steps without them, in turns."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = scene.servers[scene.plan.owner_of(0).id]
    host, _, port = server.address.rpartition(":")
    calm_s, crowded_s = [], []
    for _ in range(3):
        calm_s.append(seconds_a_step(scene, STEPS_MEASURED))
        with ExitStack() as kept:
            opener = threading.Thread(target=open_silent, args=((host, int(port)), SILENT_LONG, kept), name="opener")
            opener.start()
            crowded_s.append(seconds_a_step(scene, STEPS_MEASURED))
            opener.join()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    ratio = statistics.median(crowded_s) / statistics.median(calm_s)
    print(f"{SILENT_LONG} silent connections: {crowded_s} s a step, {calm_s} without, x {ratio:.2f}")
    assert "ZooKeeper is silent" not in run.output
    scene.check_that_training_goes_on()  # in the same term
    assert ratio < STEP_RATIO_MAX


@pytest.mark.parametrize(
    "peers", [MUTATED, pytest.param(MUTATED_LONG, marks=[pytest.mark.long, pytest.mark.timeout(7200)])]
)
def test_mutated_frames_leave_nothing_behind(scene: Scene, peers: int) -> None:
    """Three from each peer, half of which have proved the key."""
    mutate(scene, 100, seed=1)
    before, resident = [holdings(pid) for pid in scene.pids], [resident_bytes(pid) for pid in scene.pids]
    mutate(scene, peers, seed=2)
    scene.check_that_training_goes_on()
    after = [holdings(pid) for pid in scene.pids]
    growth = [resident_bytes(pid) - former for pid, former in zip(scene.pids, resident, strict=True)]
    print(f"{3 * peers} frames: {before} before, {after} after; resident memory {resident}, and {growth} more")
    for now, then in zip(after, before, strict=True):
        assert now.threads <= then.threads + 1 and now.memfd_mappings <= then.memfd_mappings
        assert now.sockets_and_memory <= then.sockets_and_memory + 5
    assert max(growth) < GROWTH_BYTES_MAX, growth


def test_the_result_has_the_same_bits_and_the_key_is_nowhere(site: Site, run: Run) -> None:
    os.kill(site.pids(JOB, "servers")[0], signal.SIGKILL)  # what a failure prints is looked at, too
    run.wait_for_line(lambda line: "a process died: restarting" in line)
    run.wait_for_line(lambda line: line.startswith("step "))
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                assert KEY.encode() not in (process / "cmdline").read_bytes()
            except OSError:
                pass  # it has ended
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output
    assert KEY not in run.output
    for path in site.home.rglob("*"):  # all that Redis and ZooKeeper have written, and the logs
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    last = site.describe(JOB).committed
    calm = start(site, JOB + "-not", "--steps", str(last), "--pace-s", "0", servers=1)
    assert calm.finish() == 0, calm.output
    assert site.digest(JOB, last) == site.digest(JOB + "-not", last)


def test_over_tcp_with_tls_the_bits_are_the_same(site: Site, tmp_path: Path) -> None:
    authority(tmp_path / "tls")
    files = {"CERT": "cert.pem", "KEY": "key.pem", "CA": "cert.pem"}
    env = {f"PSA_TLS_{name}": str(tmp_path / "tls" / file) for name, file in files.items()}
    for job, more in (("tls", {**env, "PSA_KEY": KEY, "PSA_CARRIER": "tcp"}), ("tls-not", {})):
        run = site.run(job, "--steps", "60", "--pace-s", "0", env=more, workers=2, ranks=2, servers=2)
        assert run.finish() == 0, run.output
        assert "refused" not in run.output
    assert site.digest("tls", 60) == site.digest("tls-not", 60)


def seconds_a_step(scene: Scene, steps: int) -> float:
    with closing(scene.peer("unix")) as peer:
        peer.hello(by_reference=False)
        version = peer.report()["version"] + 1
        peer.see_version(version)
        begin_s = time.monotonic()
        peer.see_version(version + steps)
        return (time.monotonic() - begin_s) / steps


def open_silent(address: tuple[str, int], count: int, kept: ExitStack) -> None:
    """Each from an address of its own, of 250."""
    for number in range(count):
        sock = kept.enter_context(socket.socket())
        sock.bind((f"127.0.0.{2 + number % 250}", 0))
        sock.connect(address)


def received(peer: Peer) -> bytes:
    try:
        return peer.sock.recv(4096)
    except ConnectionResetError:
        return b""


def exchange(peer: Peer, opening: bytes) -> bytes:
    """Say that, and return the whole answer of the server."""
    peer.throw(opening)
    answer = b""
    while len(answer) < HEADER_BYTES:
        part = received(peer)
        assert part, "the server has closed the connection"
        answer += part
    return answer


def mutate(scene: Scene, count: int, seed: int) -> None:
    """Send frames with some bytes changed, and close; every second time the key was proved before."""
    rng = random.Random(seed)
    hello = encode(Hello(JOB, scene.layout.fingerprint, "worker-mutated", by_reference=False))
    plan = scene.plan
    good = (
        Header(Kind.HELLO, length=len(hello)).pack() + hello,
        Header(Kind.PULL, plan.term, plan.revision, shard=0).pack(),
        Header(Kind.AWAIT, plan.term, plan.revision, step=1).pack(),
        Header(Kind.NORM, plan.term, plan.revision, length=16).pack() + bytes(16),
        Header(Kind.INSPECT).pack(),
    )
    for number in range(count):
        peer = scene.peer(rng.choice(CARRIERS)) if number % 2 else raw(scene, rng.choice(CARRIERS))
        if number % 4 == 1:
            peer.hello()
        data = bytearray(b"".join(rng.choices(good, k=3)))
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        peer.throw(bytes(data))
        scene.peers.close()
