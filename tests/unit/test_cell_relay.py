"""The relay of a server over real sockets: what it hands on and how, and what it refuses without keeping anything."""

from __future__ import annotations

import array
import fcntl
import gc
import json
import os
import socket
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from psa_store.cluster import Plan
from psa_store.errors import Disconnected
from psa_store.job.config import JobConfig
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.job.wire_layout import WireLayout
from psa_store.optim import SGD
from psa_store.server.aggregator import Aggregator
from psa_store.server.entrance import Limits
from psa_store.server.frame_handler import FrameHandler
from psa_store.testing.journal import Journal
from psa_store.wire import PROTOCOL, RELAY_HEAD, Connection, Door, Flag, Header, Kind, Mailbox, Reason, SharedMemory
from psa_store.wire.frames import PAYLOAD_BYTES_MAX

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is passed on Linux only")
VERSION = 4
HEAD = RELAY_HEAD.pack(4, 8)
SPEC = TensorSpec(("weight",), (4,), "float32", TensorRole.TRAINED)
LAYOUT = make_layout([SPEC])
CONFIG = JobConfig("demo", 2, 0, SGD().to_dict(), LAYOUT.fingerprint, stages=3, microbatches=2)
BEHIND = {"flags": Flag.BACKWARD}
BY_REFERENCE = {"flags": Flag.BY_REFERENCE}


def plan_of(*holders: str, term: int = 5, revision: int = 9) -> Plan:
    """``holders``: of the stages of both ranks."""
    cells = tuple(holder for holder in holders for _ in range(CONFIG.ranks))
    return Plan(term, revision, 0, (), (), cells, stages=CONFIG.stages)


class Peer:
    """A worker's end of a connection, moved by hand."""

    def __init__(self, scene: Scene, name: str, carrier: str) -> None:
        ours, theirs = connected(carrier)
        self._scene = scene
        self._connection = Connection(ours, "server", lambda _, header: memoryview(bytearray(header.length)))
        self._served = scene.handler.connections.add(theirs, name)
        hello = {"format": PROTOCOL, "job": CONFIG.name, "layout": LAYOUT.fingerprint, "by_reference": True}
        self.say(Kind.HELLO, json.dumps({**hello, "member": name}).encode())
        assert [header.kind for header, _, _ in self.answers()] == [Kind.WELCOME]

    def close(self) -> None:
        self._connection.close()

    def say(self, kind: Kind, payload: bytes = b"", fds: tuple[int, ...] = (), **fields: Any) -> None:
        """Send a frame of the present term, and let the server deal with it."""
        plan = self._scene.plan
        header = Header(kind, **{"term": plan.term, "revision": plan.revision, "length": len(payload), **fields})
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.throw(header.pack() + payload, rights)

    def throw(self, data: bytes, rights: Sequence[tuple[int, int, array.array[int]]] = ()) -> None:
        """Send raw bytes, and let the server deal with them."""
        assert self._connection._sock.sendmsg([data], rights) == len(data)
        self._scene.serve()

    def relay(self, payload: bytes = b"carry", fds: tuple[int, ...] = (), **fields: Any) -> None:
        """Send something to stage 1 of rank 0 in the present step, or wherever ``fields`` say."""
        self.say(Kind.RELAY, HEAD + payload, fds, **{"step": VERSION, "stage": 1, **fields})

    def want(self, **fields: Any) -> None:
        self.say(Kind.WANT, **{"step": VERSION, "stage": 1, **fields})

    def answers(self) -> list[tuple[Header, bytes, bytes | None]]:
        """What has come, each with its payload and what stands in the memory that came with it."""
        self._scene.serve()
        found = []
        for header, payload in self._connection.receive():
            descriptor = self._connection.take_descriptor()
            memory = None if descriptor is None else bytes(SharedMemory.attach(descriptor, 1).buffer[:8])
            whole = bytes(payload)
            found.append((header, whole[len(HEAD) :] if header.kind is Kind.RELAY else whole, memory))
        return found

    def items(self) -> list[tuple[int, bytes, bytes | None]]:
        """The same of RELAY, as (micro-batch, payload, memory); there must be nothing else."""
        answers = self.answers()
        assert all(header.kind is Kind.RELAY for header, _, _ in answers), answers
        return [(header.microbatch, payload, memory) for header, payload, memory in answers]

    def is_refused(self, reason: Reason, words: str) -> None:
        """The last frame was refused, and the connection is as good as before."""
        [(header, payload, _)] = self.answers()
        assert (header.kind, header.reason) == (Kind.REFUSED, reason) and words in payload.decode()
        self.is_well()

    def is_thrown_out(self, words: str) -> None:
        with pytest.raises(Disconnected):
            for header, payload, _ in self.answers():
                assert header.kind is Kind.REFUSED and words in payload.decode()
            self.answers()
        assert self._served not in set(self._scene.handler.connections)

    def is_well(self) -> None:
        self.say(Kind.INSPECT)
        assert [header.kind for header, _, _ in self.answers()] == [Kind.REPORT]


class Scene:
    """The server's side, with no shards of its own: they have no part in this."""

    def __init__(self, kept: ExitStack) -> None:
        self._kept = kept
        mailbox = Mailbox[None]()
        kept.callback(mailbox.close)
        self.handler = FrameHandler(
            member="server-a",
            config=CONFIG,
            layout=LAYOUT,
            wire=WireLayout(LAYOUT),
            listeners=[],
            wake=mailbox,
            journal=Journal(None, "server", "a"),
            peer_gone=lambda peer: None,
            door=Door(CONFIG.name),
            limits=Limits.of(1024),
            refused=lambda: None,
        )
        kept.callback(self.handler.connections.close_all)
        self.follow(plan_of("front", "middle", "back"))

    def follow(self, plan: Plan, version: int = VERSION) -> None:
        self.plan = plan
        served = SimpleNamespace(
            plan=plan, version=version, committed=0, owned_shards={}, untouched=0, stage="collecting"
        )
        self.handler.aggregator = cast(Aggregator, served)
        self.handler.revise(plan, version)

    def peer(self, name: str, carrier: str = "unix") -> Peer:
        peer = Peer(self, name, carrier)
        self._kept.callback(peer.close)
        return peer

    def serve(self) -> None:
        """Deal with all that has come."""
        while events := self.handler.connections.wait(0.0):
            readable = [event for event in events if event[1] & 1]
            self.handler.connections.serve(events)
            if not readable:
                return


@pytest.fixture
def scene() -> Iterator[Scene]:
    with ExitStack() as kept:
        yield Scene(kept)


def connected(carrier: str) -> tuple[socket.socket, socket.socket]:
    if carrier == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]


def memory_of(text: bytes) -> SharedMemory:
    memory = SharedMemory.create("test", len(text))
    memory.buffer[: len(text)] = text
    return memory


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# --- handing on


def test_a_cell_gets_what_was_sent_before_it_asked_and_after(scene: Scene) -> None:
    front, middle, back = scene.peer("front"), scene.peer("middle"), scene.peer("back", "tcp")
    front.relay(b"first")
    middle.want()
    assert middle.items() == [(0, b"first", None)]
    front.relay(b"second", microbatch=1)
    back.relay(b"third", **BEHIND)
    front.relay(b"for another rank", rank=1)
    front.relay(b"for the next step", step=VERSION + 1)
    assert middle.items() == [(1, b"second", None), (0, b"third", None)]
    assert front.answers() == back.answers() == []
    front.want(stage=0)
    back.relay(b"part of a tied gradient", stage=0, microbatch=4, **BEHIND)
    back.relay(b"run ahead", stage=0, microbatch=7, **BEHIND)
    assert front.items() == [(4, b"part of a tied gradient", None), (7, b"run ahead", None)]


def test_memory_is_handed_on_by_its_descriptor_and_by_value_over_tcp(scene: Scene) -> None:
    front, near, far = scene.peer("front"), scene.peer("middle"), scene.peer("far", "tcp")
    memory = memory_of(b"tensors!")
    for reader in (near, far):
        reader.want()
    front.relay(b"description", (memory.fd,), **BY_REFERENCE)
    [(header, payload, passed)] = near.answers()
    assert (payload, passed) == (b"description", b"tensors!") and header.flags & Flag.BY_REFERENCE
    [(header, payload, passed)] = far.answers()
    assert payload.startswith(b"descriptiontensors!") and passed is None and not header.flags & Flag.BY_REFERENCE


def test_the_same_again_is_kept_once_however_it_comes_and_other_bytes_are_refused(scene: Scene) -> None:
    front, middle = scene.peer("front"), scene.peer("middle")
    same, other = memory_of(b"tensors!"), memory_of(b"tensors?")
    middle.want()
    front.relay(b"0123tensors!")
    front.relay(b"0123tensors!")
    front.relay(b"0123", (same.fd,), **BY_REFERENCE)
    assert front.answers() == []
    for again in (b"0123tensors?", b"9123tensors!"):
        front.relay(again)
        front.is_refused(Reason.WRONG, "computed twice in step 4, with other results")
    front.relay(b"0123", (other.fd,), **BY_REFERENCE)
    front.is_refused(Reason.WRONG, "with other results")
    assert middle.items() == [(0, b"0123tensors!", None)]
    assert len(scene.handler.relay) == 1


def test_readers_are_told_when_a_step_is_over_and_those_that_come_too_late_too(scene: Scene) -> None:
    front, middle, late = scene.peer("front"), scene.peer("middle"), scene.peer("late")
    front.relay(b"it")
    middle.want(stage=1)
    middle.want(stage=2)
    assert middle.items() == [(0, b"it", None)]
    scene.handler.relay.advance(scene.plan, VERSION + 1)
    scene.follow(scene.plan, VERSION + 1)
    [(header, _, _)] = middle.answers()
    assert (header.kind, header.term, header.step) == (Kind.WANT, scene.plan.term, VERSION + 1), "once for all cells"
    late.want()
    assert [(header.kind, header.step) for header, _, _ in late.answers()] == [(Kind.WANT, VERSION + 1)]
    front.relay(b"it again")
    assert front.answers() == [] and len(scene.handler.relay) == 0


def test_a_new_holder_gets_what_was_for_the_former_one(scene: Scene) -> None:
    front, middle = scene.peer("front"), scene.peer("middle")
    middle.want()
    front.relay()
    middle.close()
    scene.follow(plan_of("front", "back", "back", revision=10))
    back = scene.peer("back")
    back.want()
    assert back.items() == [(0, b"carry", None)]
    back.relay(b"gradient", stage=0, **BEHIND)
    front.want(stage=0)
    assert front.items() == [(0, b"gradient", None)]


def test_nothing_of_a_term_is_handed_on_in_the_next(scene: Scene) -> None:
    front = scene.peer("front")
    front.relay()
    scene.handler.end()
    scene.follow(plan_of("front", "middle", "back", term=6, revision=10))
    middle = scene.peer("middle")
    middle.want()
    assert middle.items() == [] and len(scene.handler.relay) == 0


# --- refusing


@pytest.mark.parametrize("carrier", ["unix", "tcp"])
@pytest.mark.parametrize(
    "fields",
    [
        {"stage": 2},
        {"stage": 1, "rank": 1},
        {"stage": 0, **BEHIND},
        {"stage": 1, **BEHIND},
        {"stage": 0, "microbatch": 7, **BEHIND},
    ],
    ids=["from another stage", "of another rank", "backward", "backward from the last", "to run ahead"],
)
def test_what_comes_from_a_worker_without_the_sending_cell_is_refused(
    scene: Scene, carrier: str, fields: dict[str, Any]
) -> None:
    stranger = scene.peer("stranger", carrier)
    stranger.relay(**fields)
    stranger.is_refused(Reason.NOT_HOLDER, "is held by another worker")
    assert len(scene.handler.relay) == 0


@pytest.mark.parametrize("carrier", ["unix", "tcp"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"stage": 2}, Reason.NOT_HOLDER), ({"term": 4}, Reason.STALE)],
    ids=["another's cell", "a term that is over"],
)
def test_no_memory_is_taken_for_what_is_refused(
    scene: Scene, carrier: str, fields: dict[str, Any], reason: Reason
) -> None:
    stranger, liar = scene.peer("stranger", carrier), scene.peer("liar", carrier)
    payload = bytes(100_000)
    tracemalloc.start()
    try:
        for _ in range(5):
            stranger.relay(payload, **fields)
        liar.relay(payload, **fields, length=PAYLOAD_BYTES_MAX)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(payload), "besides what the test itself sends"
    refused = stranger.answers()
    assert [(header.kind, header.reason) for header, _, _ in refused] == [(Kind.REFUSED, reason)] * 5
    stranger.is_well()
    assert liar.answers() == [] and len(scene.handler.relay) == 0


def test_a_holder_whose_payload_was_discarded_before_it_was_one_is_told_of_the_plan(scene: Scene) -> None:
    late = scene.peer("late")
    late.relay(b"beginning", length=len(HEAD) + 2 * len(b"beginning"))
    scene.follow(plan_of("late", "middle", "back", revision=10))
    late.throw(b"beginning")
    [(header, payload, _)] = late.answers()
    assert (header.kind, header.reason, header.revision) == (Kind.REFUSED, Reason.NOT_HOLDER, 10)
    assert b"when this came" in payload and len(scene.handler.relay) == 0
    late.relay()
    assert late.answers() == [] and len(scene.handler.relay) == 1


@pytest.mark.parametrize("fields", [{"stage": 3}, {"rank": 2}, {"step": VERSION + 2}, {"microbatch": 2}])
def test_what_no_correct_worker_sends_is_not_waited_for(scene: Scene, fields: dict[str, Any]) -> None:
    front = scene.peer("front")
    front.relay(**fields, length=PAYLOAD_BYTES_MAX)
    front.is_thrown_out("RELAY")


@pytest.mark.parametrize("carrier", ["unix", "tcp"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stage": 0}, "RELAY for stage 0"),
        ({"stage": 3}, "RELAY for stage 3"),
        ({"stage": 2, **BEHIND}, "RELAY for stage 2"),
        ({"stage": 65535, **BEHIND}, "RELAY for stage 65535"),
        ({"rank": 2}, "of rank 2"),
        ({"rank": 2**32 - 1}, "of rank 4294967295"),
        ({"microbatch": 2}, "micro-batch 2, and there are 2"),
        ({"microbatch": 8, **BEHIND}, "micro-batch 8, and there are 2"),
        ({"step": VERSION + 2}, "for step 6 while version 4"),
        ({"step": 2**60}, "while version 4"),
        ({"payload": b"", **BY_REFERENCE}, "by reference comes with a descriptor"),
    ],
)
def test_what_no_correct_worker_sends_ends_its_connection(
    scene: Scene, carrier: str, fields: dict[str, Any], words: str
) -> None:
    front = scene.peer("front", carrier)
    front.relay(**fields)
    front.is_thrown_out(words)
    assert len(scene.handler.relay) == 0


@pytest.mark.parametrize(
    "fields", [{"stage": 3}, {"rank": 2}, {"step": VERSION + 2}], ids=lambda fields: next(iter(fields))
)
def test_wanting_what_there_is_not_ends_the_connection(scene: Scene, fields: dict[str, Any]) -> None:
    peer = scene.peer("middle")
    peer.want(**fields)
    peer.is_thrown_out("WANT")


@pytest.mark.parametrize(
    ("size_bytes", "seals", "flags", "words"),
    [
        (4096, 0, Flag.BY_REFERENCE, "not sealed"),
        (4096, fcntl.F_SEAL_GROW, Flag.BY_REFERENCE, "not sealed"),
        (PAYLOAD_BYTES_MAX + 4096, fcntl.F_SEAL_SHRINK, Flag.BY_REFERENCE, "are possible"),
        (4096, fcntl.F_SEAL_SHRINK, Flag.NONE, "by value without one"),
    ],
    ids=["no seals", "another seal", "too large", "not announced"],
)
def test_memory_that_is_none_ends_the_connection_that_it_comes_over_and_no_reader_s(
    scene: Scene, size_bytes: int, seals: int, flags: Flag, words: str
) -> None:
    front, near, far = scene.peer("front"), scene.peer("near"), scene.peer("far", "tcp")
    for reader in (near, far):
        reader.want()
    before = descriptors()
    fd = os.memfd_create("psa-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    front.relay(fds=(fd,), flags=flags)
    os.close(fd)
    front.is_thrown_out(words)
    assert descriptors() == before - 1, "only the connection's own may be gone"
    for reader in (near, far):
        assert reader.answers() == []
        reader.is_well()


def test_a_frame_of_a_term_that_is_over_leaves_no_memory_behind_and_the_next_may_bring_some(scene: Scene) -> None:
    front, middle, memory = scene.peer("front"), scene.peer("middle"), memory_of(b"tensors!")
    middle.want()
    before = descriptors()
    for _ in range(3):
        front.relay(fds=(memory.fd,), term=scene.plan.term - 1, **BY_REFERENCE)
        front.is_refused(Reason.STALE, "the term is over")
        assert descriptors() == before
    front.relay(fds=(memory.fd,), **BY_REFERENCE)
    assert middle.items() == [(0, b"carry", b"tensors!")]
    assert descriptors() == before + 1, "the relay's"


def test_a_term_that_ends_while_a_frame_comes_leaves_no_memory_behind(scene: Scene) -> None:
    front, memory = scene.peer("front"), memory_of(b"tensors!")
    before = descriptors()
    front.relay(b"car", (memory.fd,), length=len(HEAD) + 5, **BY_REFERENCE)  # two bytes are still to come
    assert descriptors() == before + 1
    scene.handler.end()
    front._connection._sock.sendall(b"ry")
    scene.serve()
    assert descriptors() == before
    scene.follow(plan_of("front", "middle", "back", term=6, revision=10))
    front.relay(fds=(memory.fd,), **BY_REFERENCE)
    assert front.answers() == [] and len(scene.handler.relay) == 1


def test_memory_is_given_back_with_its_step_its_term_and_its_refusal(scene: Scene) -> None:
    front, stranger, memory = scene.peer("front"), scene.peer("stranger"), memory_of(b"tensors!")
    before = descriptors()
    stranger.relay(fds=(memory.fd,), **BY_REFERENCE)
    stranger.is_refused(Reason.NOT_HOLDER, "")
    front.relay(fds=(memory.fd,), step=VERSION - 1, **BY_REFERENCE)
    for _ in range(2):
        front.relay(fds=(memory.fd,), **BY_REFERENCE)  # the second one is compared, and let go
    assert descriptors() == before + 2, "of two steps"
    scene.handler.relay.advance(scene.plan, VERSION)
    assert descriptors() == before + 1
    scene.handler.end()
    assert descriptors() == before


def test_what_is_for_a_plan_to_come_waits_for_it_with_its_memory(scene: Scene) -> None:
    back, middle, memory = scene.peer("back"), scene.peer("middle"), memory_of(b"tensors!")
    middle.want()
    back.relay(fds=(memory.fd,), revision=10, **BY_REFERENCE)
    assert middle.items() == []
    scene.follow(plan_of("back", "middle", "back", revision=10))
    assert middle.items() == [(0, b"carry", b"tensors!")]
