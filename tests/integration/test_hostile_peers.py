"""Broken, lying and hostile peers of a live server: it goes on, holds nothing of them, and the result is the same.

One file, since all peers are let loose on one running job, whose result is compared at the end.
"""

from __future__ import annotations

import fcntl
import math
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from psa_store.compression import parse_compression
from psa_store.job.layout import TensorRole
from psa_store.wire import PROTOCOL, Flag, Header, Kind, Reason
from psa_store.wire.frames import HEADER_BYTES, HELLO_BYTES_MAX, PAYLOAD_BYTES_MAX
from tests.harness import Run, Site
from tests.integration.peers import NUMBERS, STEPS, Holdings, Scene, holdings, look, resident_bytes, running, start

CARRIERS = ["unix", "tcp"]
JOB = "hostile-peers"
ROUNDS = 200
WARM_UP = 20
"""Rounds after which a server has everything that it makes once and keeps."""
SETTLING_STEPS = 10
POOL_MAY_GROW = 3
"""Threads of a server that use Redis. What leaks with each peer is hundreds."""
GROWTH_BYTES_MAX = 5 << 20
LONG = HELLO_BYTES_MAX - 300
LINGER_S = 2.0


# --- what hostile peers do. Each function lets some loose, and checks what they get for it.

Deed = Callable[[Scene, str], None]
DEEDS: dict[str, Deed] = {}


def deed(function: Deed) -> Deed:
    DEEDS[function.__name__.replace("_", " ")] = function
    return function


@deed
def a_torn_header(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.throw(Header(Kind.HELLO, length=10).pack()[:10])
    peer.close()


@deed
def a_torn_header_and_then_silence(scene: Scene, carrier: str) -> None:
    scene.peer(carrier).throw(Header(Kind.HELLO, length=10).pack()[: HEADER_BYTES - 1])


@deed
def a_payload_that_never_comes(scene: Scene, carrier: str) -> None:
    scene.peer(carrier).throw(Header(Kind.HELLO, length=1000).pack() + b"{")


@deed
def death_in_the_middle_of_a_push(scene: Scene, carrier: str) -> None:
    peer, shard = scene.peer(carrier), scene.shard()
    peer.hello()
    peer.say(Kind.PUSH, length=shard.size_bytes)
    peer.throw(bytes(shard.size_bytes // 2))
    peer.close()


@deed
def death_of_the_holder_in_the_middle_of_a_push(scene: Scene, carrier: str) -> None:
    shard = scene.shard()
    with scene.in_the_name_of_the_holder() as pose:
        peer, step = pose(carrier)
        peer.say(Kind.PUSH, step=step, rank=scene.ranks - 1, shard=shard.index, length=shard.size_bytes)
        peer.throw(np.ones(shard.size_bytes // 8, dtype="<f4").tobytes())
        peer.close()


@deed
def garbage(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.throw(random.Random(1).randbytes(4096))
    peer.is_thrown_out("not a psa frame")


@deed
def a_web_browser(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.throw(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n".ljust(HEADER_BYTES))
    peer.is_thrown_out("not a psa frame")


@deed
def a_length_that_is_too_short(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.throw(Header(Kind.HELLO, length=5).pack() + b'{"protocol":2}')
    peer.is_thrown_out("unreadable text")


@deed
def a_length_beyond_all_limits(scene: Scene, carrier: str) -> None:
    for kind, length, flags in (
        (Kind.HELLO, 1 << 40, Flag.NONE),
        (Kind.PUSH, 1 << 40, Flag.NONE),
        (Kind.PUSH, 4, Flag.BY_REFERENCE),
        (Kind.AWAIT, 1, Flag.NONE),
        (Kind.NORM, 1 << 30, Flag.NONE),
    ):
        peer = scene.peer(carrier)
        peer.hello()
        peer.say(kind, length=length, flags=flags)
        peer.is_thrown_out(f"{kind.name} announces {length} bytes")


@deed
def a_push_that_is_larger_than_any_shard(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello()
    peer.say(Kind.PUSH, length=1 << 31)
    peer.is_thrown_out("no shard is larger")


@deed
def a_push_of_another_length_than_the_shard(scene: Scene, carrier: str) -> None:
    shard = scene.shard()
    with scene.in_the_name_of_the_holder() as pose:
        for length in (shard.size_bytes - 4, shard.size_bytes + 4, 0):
            peer, step = pose(carrier)
            peer.say(Kind.PUSH, step=step, rank=scene.ranks - 1, shard=shard.index, length=length)
            peer.is_thrown_out(f"PUSH of {length} bytes for shard")


@deed
def hello_from_elsewhere(scene: Scene, carrier: str) -> None:
    for what, said, why in (
        ("job", "another", "job is "),
        ("job", ["a"], "HELLO cannot be read: job"),
        ("layout", "0" * 64, "layout is "),
        ("layout", None, "HELLO cannot be read: layout"),
        ("format", 1, f"HELLO has format 1, and this release of psa_store reads format {PROTOCOL}"),
    ):
        peer = scene.peer(carrier)
        peer.hello(**{what: said})
        peer.is_thrown_out(why)


@deed
def hello_that_is_no_text(scene: Scene, carrier: str) -> None:
    for payload in (b"", b"[]", b"null", b'{"protocol":', b"\xff\xfe", b'{"protocol":' + b"9" * 1000 + b"}"):
        peer = scene.peer(carrier)
        peer.say(Kind.HELLO, payload)
        peer.is_thrown_out("unreadable text")


@deed
def text_of_boundless_depth(scene: Scene, carrier: str) -> None:
    for kind, depth in ((Kind.HELLO, HELLO_BYTES_MAX), (Kind.REFUSED, 200_000)):
        peer = scene.peer(carrier)
        if kind is not Kind.HELLO:
            peer.hello()
        peer.say(kind, b"[" * depth)
        peer.is_thrown_out("unreadable text")


@deed
def hello_that_is_longer_than_any(scene: Scene, carrier: str) -> None:
    """It would take memory before anything is known of the peer; and so would other text before it."""
    for kind, length, why in (
        (Kind.HELLO, HELLO_BYTES_MAX + 1, f"HELLO announces {HELLO_BYTES_MAX + 1} bytes"),
        (Kind.HELLO, 1 << 20, "HELLO announces 1048576 bytes"),
        (Kind.REFUSED, 1 << 20, "REFUSED before HELLO"),
        (Kind.WELCOME, 1 << 20, "WELCOME before HELLO"),
    ):
        peer = scene.peer(carrier)
        peer.say(kind, length=length)
        peer.is_thrown_out(why)


@deed
def hello_twice(scene: Scene, carrier: str) -> None:
    """The name is as long as can be."""
    peer, name = scene.peer(carrier), f"worker-{next(NUMBERS)}-" + "x" * LONG
    peer.hello(name)
    peer.see_version(0)
    peer.hello(name)
    peer.is_closed()


@deed
def hello_of_a_name_that_cannot_be_printed(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello("\ud800\x1b[31m\n" + "x" * LONG)
    peer.is_thrown_out("HELLO without a name")


@deed
def hello_without_a_name(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello("")
    peer.say(Kind.PULL)
    peer.is_thrown_out("")


@deed
def anything_before_hello(scene: Scene, carrier: str) -> None:
    for kind in (Kind.SHARE, Kind.PUSH, Kind.PULL, Kind.AWAIT, Kind.NORM, Kind.FINISH, Kind.RELAY, Kind.WANT):
        peer = scene.peer(carrier)
        peer.say(kind)
        peer.is_thrown_out(f"{kind.name} before HELLO")


@deed
def what_only_servers_say(scene: Scene, carrier: str) -> None:
    for kind in (Kind.PARAMS, Kind.VERSION, Kind.DURABLE, Kind.REPORT):
        peer = scene.peer(carrier)
        peer.hello()
        peer.say(kind)
        peer.is_thrown_out(f"takes no {kind.name}")


@deed
def a_push_for_a_rank_of_another(scene: Scene, carrier: str) -> None:
    """By value and by reference; the numbers are such that they would show in the result."""
    shard, memory = scene.shard(), scene.gradient_memory()
    peer = scene.peer(carrier)
    peer.hello()
    version = peer.report()["version"]
    if carrier == "unix":
        peer.say(Kind.SHARE, fds=[memory.fd])
    for step in (version, version + 1, version + 2):
        for rank in (*range(scene.ranks), scene.ranks, 2**32 - 1):
            payload = memory.buffer[: shard.size_bytes]
            peer.say(Kind.PUSH, payload, step=step, rank=rank, shard=shard.index)
            peer.is_refused(Reason.NOT_HOLDER)
            peer.say(Kind.PUSH, step=step, rank=rank, shard=shard.index, flags=Flag.BY_REFERENCE)
            peer.is_refused(Reason.NOT_HOLDER)


@deed
def a_push_to_a_server_that_does_not_own_the_shard(scene: Scene, carrier: str) -> None:
    elsewhere = scene.shard_led_elsewhere(0)
    peer = scene.peer(carrier, 0)
    peer.hello()
    peer.say(Kind.PUSH, bytes(elsewhere.size_bytes), shard=elsewhere.index)
    peer.is_refused(Reason.NOT_OWNER)
    peer.say(Kind.PUSH, shard=0, shards=len(scene.layout.shards), flags=Flag.BY_REFERENCE)
    peer.is_refused(Reason.NOT_OWNER)


@deed
def a_push_of_a_term_that_is_over(scene: Scene, carrier: str) -> None:
    shard, term = scene.shard(), scene.plan.term - 1
    with scene.in_the_name_of_the_holder() as pose:
        peer, step = pose(carrier)
        about = {"term": term, "step": step, "rank": scene.ranks - 1, "shard": shard.index}
        peer.say(Kind.PUSH, np.ones(shard.size_bytes // 4, dtype="<f4").tobytes(), **about)
        peer.is_refused(Reason.STALE)
        peer.say(Kind.PUSH, flags=Flag.BY_REFERENCE, **about)
        peer.is_refused(Reason.STALE)


@deed
def a_push_for_a_step_that_has_not_begun(scene: Scene, carrier: str) -> None:
    shard = scene.shard()
    with scene.in_the_name_of_the_holder() as pose:
        for flags in (Flag.NONE, Flag.BY_REFERENCE):
            peer, step = pose(carrier)
            payload = b"" if flags else bytes(shard.size_bytes)
            peer.say(Kind.PUSH, payload, step=step + 1, rank=scene.ranks - 1, shard=shard.index, flags=flags)
            peer.is_thrown_out(f"PUSH for step {step + 1}")


@deed
def a_push_that_admits_to_hold_nan(scene: Scene, carrier: str) -> None:
    shard = scene.shard()
    with scene.in_the_name_of_the_holder() as pose:
        peer, step = pose(carrier)
        about = {"step": step, "rank": scene.ranks - 1, "shard": shard.index}
        peer.say(Kind.PUSH, bytes(shard.size_bytes), flags=Flag.NONFINITE, **about)
        peer.is_thrown_out("NaN or Inf")


@deed
def a_push_of_a_weight_that_is_none(scene: Scene, carrier: str) -> None:
    for weight in (-1.0, math.nan, math.inf):
        with scene.in_the_name_of_the_holder() as pose:
            peer, step = pose(carrier)
            shard = scene.shard()
            about = {"step": step, "rank": scene.ranks - 1, "shard": shard.index}
            peer.say(Kind.PUSH, bytes(shard.size_bytes), weight=weight, **about)
            peer.is_thrown_out("PUSH of weight")


@deed
def a_push_whose_marks_are_not_those_of_its_shards(scene: Scene, carrier: str) -> None:
    shard = scene.shard()
    for payload in (bytes(shard.size_bytes), bytes(shard.size_bytes + len(shard.pieces) + 1)):
        with scene.in_the_name_of_the_holder() as pose:
            peer, step = pose(carrier)
            about = {"step": step, "rank": scene.ranks - 1, "shard": shard.index}
            peer.say(Kind.PUSH, payload, flags=Flag.ABSENT, **about)
            peer.is_thrown_out(f"PUSH of {len(payload)} bytes for shard")


@deed
def a_push_from_memory_that_was_never_shared(scene: Scene, carrier: str) -> None:
    with scene.in_the_name_of_the_holder() as pose:
        peer, step = pose(carrier)
        about = {"step": step, "rank": scene.ranks - 1, "shard": scene.shard().index}
        peer.say(Kind.PUSH, memory=1, flags=Flag.BY_REFERENCE, **about)
        peer.is_thrown_out("memory 1, which was not shared")


@deed
def a_push_of_shards_that_do_not_exist(scene: Scene, carrier: str) -> None:
    shards = len(scene.layout.shards)
    for shard, count in ((0, shards + 1), (0, 2**32 - 1), (0, 0), (shards, 1), (2**32 - 1, 2**32 - 1)):
        peer = scene.peer(carrier)
        peer.hello()
        peer.say(Kind.PUSH, shard=shard, shards=count, flags=Flag.BY_REFERENCE)
        peer.is_thrown_out(f"PUSH of {count} shards")


@deed
def a_push_by_value_of_no_shard(scene: Scene, carrier: str) -> None:
    """All of no shards are owned by the server that it reaches: it may be refused as this or that, but be refused."""
    with scene.in_the_name_of_the_holder() as pose:
        for shard in (len(scene.layout.shards), scene.shard_led_elsewhere(0).index):
            peer, step = pose(carrier)
            peer.say(Kind.PUSH, bytes(4), step=step, rank=scene.ranks - 1, shard=shard, shards=0)
            assert peer.next_of(Kind.REFUSED)


@deed
def a_push_of_a_buffer_by_reference(scene: Scene, carrier: str) -> None:
    shard, memory = scene.shard(TensorRole.BUFFER).index, scene.gradient_memory()
    with scene.in_the_name_of_the_holder() as pose:
        peer, step = pose(carrier, shard)
        if carrier == "unix":
            peer.say(Kind.SHARE, fds=[memory.fd])
        peer.say(Kind.PUSH, step=step, rank=0, shard=shard, flags=Flag.BY_REFERENCE)
        peer.is_thrown_out("only gradients are pushed so")


@deed
def a_pull_of_a_shard_that_does_not_exist(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello()
    for shard in (len(scene.layout.shards), 2**32 - 1):
        peer.say(Kind.PULL, shard=shard)
        peer.is_refused(Reason.NOT_OWNER)
        peer.say(Kind.AWAIT, shard=shard)
        peer.next_of(Kind.VERSION)


@deed
def waiting_for_what_never_comes(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello()
    for kind in (Kind.PULL, Kind.AWAIT, Kind.FINISH):
        peer.say(kind, step=2**62)
    peer.report()


@deed
def waiting_for_more_than_any_worker_asks(scene: Scene, carrier: str) -> None:
    for kind in (Kind.PULL, Kind.FINISH):
        peer = scene.peer(carrier)
        peer.hello()
        plan = scene.plan
        for _ in range(300 * len(scene.layout.shards)):
            peer.throw(Header(kind, plan.term, plan.revision, step=2**62).pack())
        peer.is_thrown_out("of them wait already")


@deed
def a_frame_of_a_term_to_come(scene: Scene, carrier: str) -> None:
    """The server waits for the plan that the peer seems to know; and it must notice if the peer ends before."""
    for kind in (Kind.PULL, Kind.PUSH, Kind.NORM):
        peer = scene.peer(carrier)
        peer.hello()
        peer.next_of(Kind.WELCOME)
        peer.say(kind, term=2**40)
        peer.close()


@deed
def norms_that_are_none(scene: Scene, carrier: str) -> None:
    """Whether the server refuses or passes over them, it must not end by them."""
    for payload in (
        b"",
        bytes(8),
        bytes(13),
        bytes(24),
        np.array([[np.nan, 1.0]]).tobytes(),
        np.array([[np.inf, 1.0]]).tobytes(),
        np.array([[-1.0, 1.0], [1e300, 1.0], [0.5, np.nan]]).tobytes(),
    ):
        peer = scene.peer(carrier)
        peer.hello()
        version = peer.report()["version"]
        for step in (version, version + 1, version + 2):
            peer.say(Kind.NORM, payload, step=step)
        peer.close()


@deed
def norms_of_a_peer_that_is_no_server(scene: Scene, carrier: str) -> None:
    """They would spoil the clipping, or end a step before another server has all of it."""
    norms = np.array([[shard.index, 1e6] for shard in scene.layout.versioned]).tobytes()
    with scene.in_the_name_of_the_holder() as pose:  # it is no server either; and the step lasts until this is done
        for server in set(scene.plan.owners):
            shard = scene.plan.owners.index(server)
            for peer, step in (pose(carrier, shard), (scene.peer(carrier, shard), 0)):
                if not step:
                    peer.hello()
                    step = peer.report()["version"]
                for each in (step, step + 1):
                    peer.say(Kind.NORM, norms, step=each)


@deed
def a_second_connection_of_a_living_worker(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello(scene.plan.cells[0])
    peer.is_closed()  # when the worker comes back


@deed
def a_second_connection_of_a_living_worker_that_reads_on(scene: Scene, carrier: str) -> None:
    with scene.in_the_name_of_the_holder() as pose:
        peer, step = pose(carrier)
        peer.see_version(step)
    peer.is_closed()


@deed
def a_reader_that_never_stops_reading(scene: Scene, carrier: str) -> None:
    """It holds no rank and shows a version for as long as it likes: no process may have to wait for it."""
    peer = scene.peer(carrier)
    peer.hello()
    peer.see_version(0)


@deed
def memory_that_is_none(scene: Scene, carrier: str) -> None:
    with ExitStack() as kept:
        reader, writer = os.pipe()
        kept.callback(os.close, reader)
        kept.callback(os.close, writer)
        whole, enough = scene.gradient_memory(), scene.gradient_bytes
        write_only = os.open(f"/proc/self/fd/{whole.fd}", os.O_WRONLY)
        kept.callback(os.close, write_only)
        for fds, why in (
            ([], "without a descriptor"),
            ([memfd(kept, enough - 4096, fcntl.F_SEAL_SHRINK)], f"{enough - 4096} bytes was passed"),
            ([memfd(kept, 0, fcntl.F_SEAL_SHRINK)], "0 bytes was passed"),
            ([memfd(kept, enough, 0)], "not sealed"),
            ([memfd(kept, enough, fcntl.F_SEAL_GROW)], "not sealed"),
            ([reader], "no sealed memory"),
            ([write_only], "memory"),
            ([whole.fd, whole.fd], "more than one"),
        ):
            peer = scene.peer(carrier)
            peer.hello()
            peer.say(Kind.SHARE, fds=fds if carrier == "unix" else [])
            peer.is_thrown_out(why if carrier == "unix" else "without a descriptor")


@deed
def memory_that_comes_with_another_frame(scene: Scene, carrier: str) -> None:
    memory = scene.gradient_memory()
    for kind in (Kind.PULL, Kind.INSPECT) if carrier == "unix" else ():
        peer = scene.peer(carrier)
        peer.hello()
        peer.say(kind, fds=[memory.fd])
        peer.is_thrown_out(f"passed a descriptor with {kind.name}")


@deed
def more_memory_than_there_are_ranks(scene: Scene, carrier: str) -> None:
    memory = scene.gradient_memory()
    for numbers in ([2**32 - 1], [*range(scene.ranks), scene.ranks], [0, 0]) if carrier == "unix" else ():
        peer = scene.peer(carrier)
        peer.hello()
        for number in numbers:
            peer.say(Kind.SHARE, memory=number, fds=[memory.fd])
        peer.is_thrown_out(f"SHARE of memory {numbers[-1]}")


@deed
def memory_of_a_peer_that_said_it_shares_none(scene: Scene, carrier: str) -> None:
    memory = scene.gradient_memory()
    peer = scene.peer(carrier)
    peer.hello(by_reference=False)
    peer.say(Kind.SHARE, fds=[memory.fd] if carrier == "unix" else [])
    peer.is_thrown_out("SHARE")


@deed
def waiting_for_a_rank_that_does_not_exist(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello()
    peer.say(Kind.AWAIT, step=1, rank=scene.ranks)
    peer.is_thrown_out("AWAIT of rank")


@deed
def a_push_of_what_never_changes(scene: Scene, carrier: str) -> None:
    frozen = scene.shard(TensorRole.FROZEN)
    with scene.in_the_name_of_the_holder() as pose:
        for flags in (Flag.NONE, Flag.BY_REFERENCE):
            peer, step = pose(carrier, frozen.index)
            peer.say(Kind.PUSH, step=step, rank=scene.ranks - 1, shard=frozen.index, flags=flags)
            peer.is_thrown_out("never change")


@deed
def rank_state_in_a_job_without_rank_state(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello()
    for rank in (0, scene.ranks, (1 << 32) - 1):
        peer.say(Kind.PULL, shard=scene.shard().index, rank=rank, flags=Flag.STATE)
        answer = peer.next_of(Kind.STATE)
        assert answer.header.rank == rank and answer.header.length == 0


@deed
def clocks_of_a_job_that_does_not_ask_for_them(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello()
    peer.say(Kind.CLOCKS, term=scene.plan.term)
    assert peer.next_of(Kind.CLOCKS).header.length == 2 * 8 * scene.ranks


@deed
def cells_in_a_job_without_stages(scene: Scene, carrier: str) -> None:
    for kind, stage, flags in (
        (Kind.RELAY, 0, Flag.NONE),
        (Kind.RELAY, 1, Flag.NONE),
        (Kind.RELAY, 0, Flag.BACKWARD),
        (Kind.WANT, 1, Flag.NONE),
    ):
        peer = scene.peer(carrier)
        peer.hello()
        peer.say(kind, b"" if kind is Kind.WANT else b"carry", stage=stage, flags=flags)
        peer.is_thrown_out("there is none")


@deed
def a_cell_of_four_gigabytes_that_never_come(scene: Scene, carrier: str) -> None:
    peer = scene.peer(carrier)
    peer.hello()
    peer.say(Kind.RELAY, stage=1, length=PAYLOAD_BYTES_MAX)
    peer.is_thrown_out("there is none")


@deed
def memory_for_a_cell_of_a_term_that_is_over(scene: Scene, carrier: str) -> None:
    memory = scene.gradient_memory()
    peer = scene.peer(carrier)
    peer.hello()
    for _ in range(3):
        fds = [memory.fd] if carrier == "unix" else []
        peer.say(Kind.RELAY, fds=fds, term=scene.plan.term - 1, flags=Flag.BY_REFERENCE)
        peer.is_refused(Reason.STALE)


def memfd(kept: ExitStack, size_bytes: int, seals: int) -> int:
    fd = os.memfd_create("psa-peer", os.MFD_ALLOW_SEALING)
    kept.callback(os.close, fd)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


# --- the job on which they are let loose: one for all, whose result is compared last with an undisturbed run's


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failpoints")


@pytest.fixture(scope="module")
def run(site: Site, failpoints: Path) -> Iterator[Run]:
    with running(site, JOB, failpoints=failpoints) as run:
        yield run


@pytest.fixture
def scene(site: Site, run: Run, failpoints: Path) -> Iterator[Scene]:
    assert run.process.poll() is None, "the job has ended: " + run.output
    with look(site, JOB, failpoints) as scene:
        yield scene


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("deed", DEEDS)
def test_training_goes_on_in_spite_of(scene: Scene, deed: str, carrier: str) -> None:
    DEEDS[deed](scene, carrier)
    scene.check_that_training_goes_on()  # with the peers still there


def test_two_hundred_hostile_peers_leave_nothing_behind(scene: Scene) -> None:
    rng = random.Random(7)
    deeds = [(rng.choice(list(DEEDS.values())), rng.choice(CARRIERS)) for _ in range(ROUNDS)]
    let_loose(scene, deeds[:WARM_UP])
    before = settled(scene)
    let_loose(scene, deeds)
    left = settled(scene, before)
    assert fits(left, before), (left, before)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_thousand_peers_that_come_and_go_cost_nothing(scene: Scene, carrier: str) -> None:
    memory = scene.gradient_memory()

    def come_and_go() -> None:
        peer = scene.peer(carrier)
        peer.hello()
        if carrier == "unix":
            peer.say(Kind.SHARE, fds=[memory.fd])
        peer.report()
        scene.peers.close()

    for _ in range(100):
        come_and_go()
    before, resident = settled(scene), [resident_bytes(pid) for pid in scene.pids]
    for _ in range(1000):
        come_and_go()
    left = settled(scene, before)
    assert fits(left, before), (left, before)
    growth = [resident_bytes(pid) - former for pid, former in zip(scene.pids, resident, strict=True)]
    assert max(growth) < GROWTH_BYTES_MAX, growth


def test_peers_that_introduce_themselves_twice_are_forgotten(scene: Scene) -> None:
    before, resident = settled(scene), [resident_bytes(pid) for pid in scene.pids]
    for _ in range(100):
        DEEDS["hello twice"](scene, "unix")
        scene.peers.close()
    left = settled(scene, before)
    assert fits(left, before), (left, before)
    growth = [resident_bytes(pid) - former for pid, former in zip(scene.pids, resident, strict=True)]
    assert max(growth) < GROWTH_BYTES_MAX, growth


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_peer_that_asks_and_does_not_listen_is_not_answered_for_ever(scene: Scene, carrier: str) -> None:
    """Answers that it does not take must not pile up in the server; it may be made to wait, or be thrown out."""
    peer = scene.peer(carrier)
    peer.hello()
    pull = Header(Kind.PULL, scene.plan.term, scene.plan.revision, shard=scene.shard().index).pack()
    before = [resident_bytes(pid) for pid in scene.pids]
    peer.sock.settimeout(LINGER_S)
    with suppress(TimeoutError):
        for _ in range(10):
            peer.throw(pull * 1000)
    scene.check_that_training_goes_on()
    growth = [resident_bytes(pid) - former for pid, former in zip(scene.pids, before, strict=True)]
    assert max(growth) < 3 * GROWTH_BYTES_MAX, growth


def test_encodings_that_are_none_end_the_peer_and_nothing_else(site: Site, tmp_path: Path) -> None:
    job, int8 = "hostile-int8", parse_compression("int8")
    run = start(site, job, *STEPS, failpoints=tmp_path, servers=1, compress="int8")
    run.wait_for_step(5)
    with look(site, job, tmp_path) as scene:
        shard = next(each for each in scene.layout.shards_of(TensorRole.TRAINED) if each.dtype == "float32")
        with scene.in_the_name_of_the_holder() as pose:
            size = int8.payload_bytes(shard.numel)
            for payload, why in ((b"\1" + bytes(size - 1), "scale"), (bytes(shard.size_bytes), "PUSH of")):
                peer, step = pose("tcp", shard.index)
                peer.say(Kind.PUSH, payload, step=step, rank=scene.ranks - 1, shard=shard.index)
                peer.is_thrown_out(why)
            memory = scene.gradient_memory()
            peer, step = pose("unix", shard.index)
            peer.say(Kind.SHARE, fds=[memory.fd])
            flags = Flag.BY_REFERENCE
            peer.say(Kind.PUSH, step=step, rank=scene.ranks - 1, shard=shard.index, flags=flags)
            peer.is_thrown_out("by reference")
        scene.check_that_training_goes_on()
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output


def test_the_result_has_the_same_bits_as_without_them(site: Site, run: Run) -> None:
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output
    assert "restarting" not in run.output, "a peer has killed a process"
    last = site.describe(JOB).committed
    calm = start(site, JOB + "-not", "--steps", str(last), "--pace-s", "0", servers=1)
    assert calm.finish() == 0, calm.output
    expected = losses(calm)
    differing = [step for step, loss in losses(run).items() if loss != expected[step]]
    assert not differing, f"from step {differing[0]} on"
    assert site.digest(JOB, last) == site.digest(JOB + "-not", last)


def losses(run: Run) -> dict[int, str]:
    """What the run printed after each step."""
    found = [re.fullmatch(r"step (\d+) term \d+ loss (\S+)", line) for line in run.lines]
    return {int(match[1]): match[2] for match in found if match is not None}


def let_loose(scene: Scene, deeds: Sequence[tuple[Deed, str]]) -> None:
    for each, carrier in deeds:
        each(scene, carrier)
        scene.peers.close()


def settled(scene: Scene, enough: list[Holdings] | None = None) -> list[Holdings]:
    """The least that the servers hold in the next steps, when they notice that peers are gone; or ``enough``, or less.

    The least, since each has a connection more now and then.
    """
    least: list[Holdings] = []
    for _ in range(SETTLING_STEPS if enough is None else 3 * SETTLING_STEPS):
        scene.check_that_training_goes_on(steps=1)
        found = [holdings(pid) for pid in scene.pids]
        least = [Holdings(*map(min, *pair)) for pair in zip(least or found, found, strict=True)]
        if enough is not None and fits(least, enough):
            break
    return least


def fits(held: list[Holdings], enough: list[Holdings]) -> bool:
    """Whether that is no more, but for what a server's own threads may have opened meanwhile.

    They share a pool of connections to Redis, which grows by one when two of them ask at the same moment.
    """
    enough = [each._replace(sockets_and_memory=each.sockets_and_memory + POOL_MAY_GROW) for each in enough]
    return all(ours <= most for pair in zip(held, enough, strict=True) for ours, most in zip(*pair, strict=True))
