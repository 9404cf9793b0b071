"""Clients of a live server that a test moves by hand: they say what a worker says, and what none ever would."""

from __future__ import annotations

import array
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import psutil

from psa_store.cluster import Member, Plan, ProcessRole
from psa_store.coordination import Coordination
from psa_store.job.config import job_config_from_json
from psa_store.job.layout import Layout, Shard, TensorRole, layout_from_json
from psa_store.testing.failpoints import FailpointAction, arm
from psa_store.wire import PROTOCOL, Door, Header, Kind, Reason, Role, SharedMemory, connect
from psa_store.wire.frames import HEADER_BYTES, unpack
from tests.harness import LIVE, Run, Site

PATIENCE_S = 120.0
"""How long a peer waits for an answer: a server that does not give it by then never will."""
NUMBERS = itertools.count()
STEPS = ("--steps", "1000000", "--pace-s", "0.01")
"""Without end, until it is stopped."""


@dataclass(frozen=True)
class Frame:
    header: Header
    payload: bytes

    @property
    def text(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.payload)
        return document


@dataclass
class Peer:
    """One connection to ``server``, over its Unix socket or TCP. ``plan`` is what it believes in."""

    server: Member
    carrier: str
    job: str
    layout: Layout
    plan: Plan
    key: bytes | None = None

    def __post_init__(self) -> None:
        local = self.server.local if self.carrier == "unix" else ""
        self.sock = connect(
            self.server.address, local, self.server.host, PATIENCE_S, Door(self.job, self.key), Role.WORKER
        )
        assert (self.sock.family == socket.AF_UNIX) is (self.carrier == "unix")
        self.sock.settimeout(PATIENCE_S)

    def close(self) -> None:
        self.sock.close()

    # --- saying

    def throw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send raw bytes, whole unless the server has thrown us out already."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.sock.sendmsg([data], rights)
            self.sock.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError):
            pass

    def say(self, kind: Kind, payload: bytes = b"", fds: Sequence[int] = (), **fields: Any) -> None:
        """Send a frame of the present term; ``fields`` are the header's."""
        fields = {"term": self.plan.term, "revision": self.plan.revision, "length": len(payload), **fields}
        self.throw(Header(kind, **fields).pack() + payload, fds)

    def hello(self, member: str | None = None, **changes: Any) -> None:
        """Introduce the peer, by default under a new name."""
        member = f"worker-stranger-{next(NUMBERS)}" if member is None else member
        hello = {"format": PROTOCOL, "job": self.job, "layout": self.layout.fingerprint, "by_reference": True}
        self.say(Kind.HELLO, json.dumps({**hello, "member": member, **changes}).encode())

    # --- listening

    def next(self) -> Frame | None:
        """The next frame; None when the server has closed the connection."""
        head = self._exactly(HEADER_BYTES)
        if head is None:
            return None
        header = unpack(head)
        payload = self._exactly(header.length)
        return None if payload is None else Frame(header, payload)

    def next_of(self, kind: Kind) -> Frame:
        """The next frame of this kind; what comes before it is passed over."""
        while (frame := self.next()) is not None:
            if frame.header.kind is kind:
                return frame
        raise AssertionError(f"the server closed the connection instead of sending {kind.name}")

    def is_refused(self, reason: Reason) -> None:
        """The last frame was refused for this reason, and the connection is as good as before."""
        frame = self.next_of(Kind.REFUSED)
        assert frame.header.reason is reason, frame
        self.report()

    def is_thrown_out(self, why: str) -> None:
        """The server has closed the connection, and said why (over TCP that last word may be lost)."""
        last = self.is_closed()
        if self.carrier == "unix" or (last is not None and last.header.kind is Kind.REFUSED):
            assert last is not None and last.header.reason is Reason.WRONG, last
            assert why in last.text["why"], last.text

    def is_closed(self) -> Frame | None:
        """Wait until the server closes the connection; returns the last frame that came before."""
        last = None
        while (frame := self.next()) is not None:
            last = frame
        return last

    def report(self) -> dict[str, Any]:
        self.say(Kind.INSPECT)
        return self.next_of(Kind.REPORT).text

    def see_version(self, version: int) -> None:
        """Wait until the server has it, as a worker does that holds no rank."""
        self.say(Kind.AWAIT, step=version)
        assert self.next_of(Kind.VERSION).header.step >= version

    def _exactly(self, count: int) -> bytes | None:
        data = bytearray()
        while len(data) < count:
            try:
                part = self.sock.recv(count - len(data))
            except ConnectionResetError:
                return None
            if not part:
                return None
            data += part
        return bytes(data)


@dataclass
class Scene:
    """A running job as it is now, and the peers that a test lets loose on it. Closes them."""

    job: str
    ranks: int
    layout: Layout
    plan: Plan
    servers: Mapping[str, Member]
    workers: Mapping[str, Member]
    failpoints: Path | None = None
    """Where those of the worker are armed."""
    key: bytes | None = None
    """Of the job; peers have it, unless they are told another."""
    peers: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.peers.close()

    def peer(self, carrier: str, shard: int = 0) -> Peer:
        """A new connection to the server that owns ``shard``."""
        server = self.servers[self.plan.owner_of(shard).id]
        return self.peers.enter_context(closing(Peer(server, carrier, self.job, self.layout, self.plan, self.key)))

    @contextmanager
    def in_the_name_of_the_holder(self) -> Iterator[Callable[..., tuple[Peer, int]]]:
        """Inside, ``pose(carrier, shard)`` gives a peer that the server takes for the worker of the last rank.

        With it comes the step for which that rank has not pushed anything. The worker itself sleeps meanwhile, before
        it has, or it would come back at once; awake, it finds that it has lost its connection.
        """
        holder = self.plan.cells[-1]

        def pose(carrier: str, shard: int = 0) -> tuple[Peer, int]:
            peer = self.peer(carrier, shard)
            peer.hello(holder)
            while (report := peer.report())["stage"] != "collecting":
                pass
            return peer, report["version"]

        assert self.failpoints is not None
        self.check_that_training_goes_on()  # a worker that has just lost a connection may compute a step twice
        arm(self.failpoints, "worker.computing", FailpointAction.STOP)
        worker = psutil.Process(self.workers[holder].pid)
        begun_s = time.monotonic()
        while worker.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < begun_s + PATIENCE_S, "no step begins"
        try:
            yield pose
        finally:
            worker.resume()

    def shard(self, role: TensorRole = TensorRole.TRAINED) -> Shard:
        """The first shard of a role: any would do."""
        return self.layout.shards_of(role)[0]

    def shard_led_elsewhere(self, shard: int) -> Shard:
        """A trained shard of another server than the one that owns ``shard``."""
        return next(
            each
            for each in self.layout.shards_of(TensorRole.TRAINED)
            if self.plan.owners[each.index] != self.plan.owners[shard]
        )

    def gradient_memory(self) -> SharedMemory:
        """Memory as a worker shares it, full of numbers that would show in the result."""
        memory = SharedMemory.create("peer", self.gradient_bytes)
        np.frombuffer(memory.buffer, dtype="<f4")[:] = 1.0
        return memory

    @property
    def gradient_bytes(self) -> int:
        return max(shard.offset_bytes + shard.size_bytes for shard in self.layout.shards_of(TensorRole.TRAINED))

    @property
    def pids(self) -> list[int]:
        return [server.pid for server in self.servers.values()]

    def versions(self) -> list[int]:
        found = []
        for server in self.plan.servers:
            with closing(Peer(self.servers[server.id], "tcp", self.job, self.layout, self.plan, self.key)) as peer:
                found.append(peer.report()["version"])
        return found

    def check_that_training_goes_on(self, steps: int = 2) -> None:
        """The same processes own the same shards, and the version grows."""
        target = max(self.versions()) + steps
        for server in self.plan.servers:
            with closing(Peer(self.servers[server.id], "tcp", self.job, self.layout, self.plan, self.key)) as peer:
                peer.hello(by_reference=False)
                peer.see_version(target)
                report = peer.report()
            assert (report["server"], report["term"]) == (server.id, self.plan.term)


def look(site: Site, job: str, failpoints: Path | None = None, key: bytes | None = None) -> Scene:
    """The job as ZooKeeper and Redis know it now."""
    with closing(site.store()) as store, closing(coordination(site, job)) as zookeeper:
        found = store.read_job(job)
        assert found is not None
        zookeeper.start()
        plan = zookeeper.read_plan()
        assert plan is not None
        members = [zookeeper.members(kind) for kind in (ProcessRole.SERVER, ProcessRole.WORKER)]
    return Scene(
        job,
        job_config_from_json(found[0]).ranks,
        layout_from_json(found[1]),
        plan.plan,
        *members,
        failpoints,
        key,
    )


def coordination(site: Site, job: str) -> Coordination:
    return Coordination(site.zookeeper, job, session_timeout_s=4.0, connect_timeout_s=5.0, wake=threading.Event().set)


# --- a job on which peers are let loose


def start(
    site: Site, job: str, *arguments: str, failpoints: Path | None = None, key: str | None = None, **options: Any
) -> Run:
    # The schedule of the learning rate must not depend on where a run is stopped.
    env = {} if failpoints is None else {"PSA_FAILPOINTS": str(failpoints)}
    env |= {} if key is None else {"PSA_KEY": key}
    return site.run(job, "--total", "1000", *arguments, env=env, workers=1, ranks=2, commit_every=0, **options)


@contextmanager
def running(site: Site, job: str, **options: Any) -> Iterator[Run]:
    """One worker that shares memory with two servers, for all tests of a module; see :func:`start`."""
    run = start(site, job, *STEPS, servers=2, **options)
    LIVE.remove(run)  # it outlives the test that started it; we end it
    try:
        run.wait_for_step(5)
        while len(set(look(site, job).plan.owners)) < 2:  # unless both were there in time, one joins by a hand-over
            run.wait_for_line(lambda line: line.startswith("step "))
        yield run
    finally:
        run.kill()


# --- what a process holds, seen from outside


class Holdings(NamedTuple):
    """What a process would hold more of with every peer, if it leaked."""

    sockets_and_memory: int
    memfd_mappings: int
    threads: int


def holdings(pid: int) -> Holdings:
    return Holdings(
        sum(each.startswith(("socket:", "/memfd:", "pipe:")) for each in descriptors(pid).values()),
        len(memfd_mappings(pid)),
        len(os.listdir(f"/proc/{pid}/task")),
    )


def descriptors(pid: int) -> dict[str, str]:
    """Return the target of each descriptor of a process, by its path in /proc; nothing of another user's process."""
    found = {}
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found[str(path)] = os.readlink(path)
    return found


def memfd_mappings(pid: int) -> list[str]:
    """The lines of /proc/PID/maps that are memory of psa_store."""
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/memfd:psa-" in line]
    return []  # it has ended, or belongs to another user


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
