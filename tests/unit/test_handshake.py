"""The proof of the key: two sides that have it find each other, however the bytes arrive, and no others do."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.wire import Header, Hello, Kind, decode, encode
from psa_store.wire.documents import Refusal
from psa_store.wire.frames import HEADER_BYTES, HELLO_BYTES_MAX, unpack
from psa_store.wire.handshake import NONCE_BYTES, Accepting, Connecting, FirstFrame, Rejected, Role

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
NONCES = st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)
KEYS = st.binary(min_size=16, max_size=100)
JOBS = st.text(min_size=1, max_size=100)
ROLES = st.sampled_from(Role)


def connecting(key: bytes = KEY, job: str = "a", role: Role = Role.WORKER, nonce: int = 1) -> Connecting:
    return Connecting(key, job, role, bytes([nonce]) * NONCE_BYTES)


def accepting(key: bytes = KEY, job: str = "a", nonce: int = 2) -> Accepting:
    return Accepting(key, job, bytes([nonce]) * NONCE_BYTES)


Side = Connecting | Accepting | FirstFrame


def feed(side: Side, data: bytes, sizes: Sequence[int] = ()) -> bytes:
    """Give a side bytes in pieces of these sizes; returns what it says. What it does not want stays unread."""
    said, rest, cuts = b"", data, iter(sizes)
    while rest and side.wanted:
        count = min(side.wanted, next(cuts, len(rest)), len(rest))
        said += side.take(rest[:count])
        rest = rest[count:]
    return said


def meet(one: Connecting, other: Accepting) -> tuple[bytes, bytes]:
    """Have them talk to the end; returns the answer and the proof."""
    answer = feed(other, one.opening)
    proof = feed(one, answer)
    feed(other, proof)
    return answer, proof


@given(KEYS, JOBS, ROLES, NONCES, NONCES, st.lists(st.integers(1, 40)))
def test_two_sides_with_one_key_find_each_other_however_the_bytes_arrive(
    key: bytes, job: str, role: Role, one: bytes, other: bytes, sizes: list[int]
) -> None:
    worker, server = Connecting(key, job, role, one), Accepting(key, job, other)
    proof = feed(worker, feed(server, worker.opening, sizes), sizes)
    assert worker.done and not server.done
    assert feed(server, proof + b"the first frame", sizes) == b""
    assert server.done and server.role is role and server.wanted == worker.wanted == 0


@given(KEYS, KEYS, NONCES, NONCES)
def test_two_keys_do_not_meet(key: bytes, other: bytes, one: bytes, two: bytes) -> None:
    worker, server = Connecting(key, "a", Role.WORKER, one), Accepting(other, "a", two)
    if key == other:
        return
    with pytest.raises(Rejected, match="PSA_KEY") as at_worker:
        feed(worker, feed(server, worker.opening))
    assert not worker.done
    with pytest.raises(Rejected, match="PSA_KEY"):  # so that the log of the server says it, too
        feed(server, at_worker.value.answer)
    assert not server.done


@given(st.integers(0, 2 * HEADER_BYTES + 32 - 1), st.integers(1, 255))
def test_no_bit_may_change_on_the_way(place: int, change: int) -> None:
    worker, server = connecting(), accepting()

    def on_the_way(data: bytes, begin: int) -> bytes:
        at = place - begin
        return data if not 0 <= at < len(data) else data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]

    with pytest.raises(Rejected):
        answer = feed(server, on_the_way(worker.opening, 0))
        proof = feed(worker, on_the_way(answer, HEADER_BYTES))
        feed(server, on_the_way(proof, 2 * HEADER_BYTES))
    assert not server.done


@given(st.binary(max_size=300), st.lists(st.integers(1, 40)), st.booleans())
def test_noise_is_rejected_or_waited_for_and_never_let_in(noise: bytes, sizes: list[int], begins_well: bool) -> None:
    for side in (accepting(), connecting(), FirstFrame()):
        data = connecting().opening + noise if begins_well and isinstance(side, Accepting) else noise
        try:
            feed(side, data, sizes)
        except Rejected:
            pass
        assert not side.done


class TestReplay:
    def test_what_a_worker_said_is_worth_nothing_on_another_connection(self) -> None:
        worker = connecting()
        _, proof = meet(worker, accepting())
        again = accepting(nonce=3)
        feed(again, worker.opening)
        with pytest.raises(Rejected):
            feed(again, proof)

    def test_what_a_server_said_is_worth_nothing_on_another_connection(self) -> None:
        answer, _ = meet(connecting(), accepting())
        with pytest.raises(Rejected):
            feed(connecting(nonce=4), answer)

    def test_a_proof_is_of_one_job_and_one_role(self) -> None:
        _, proof = meet(connecting(), accepting())
        for other, job in ((connecting(role=Role.SERVER), "a"), (connecting(job="b"), "b")):
            server = accepting(job=job)  # with the random numbers of the other connection
            feed(server, other.opening)
            with pytest.raises(Rejected):
                feed(server, proof)
            assert not server.done


class TestReflection:
    def test_a_server_does_not_prove_for_a_peer_what_the_peer_is_asked(self) -> None:
        """The peer has a second connection, on which it has the server answer its own question."""
        victim = accepting(nonce=5)
        mine = connecting(nonce=6)
        asked = feed(victim, mine.opening)
        for second in (accepting(nonce=5), accepting(nonce=7)):
            answer = feed(second, mine.opening)
            with pytest.raises(Rejected):
                feed(victim, answer[-32:])
            victim = accepting(nonce=5)
            assert feed(victim, mine.opening) == asked

    def test_an_opening_sent_back_is_no_answer(self) -> None:
        worker = connecting()
        with pytest.raises(Rejected):
            feed(worker, worker.opening)

    def test_two_servers_cannot_be_put_through_to_each_other(self) -> None:
        one, other = accepting(nonce=8), accepting(nonce=9)
        answer = feed(one, connecting().opening)
        with pytest.raises(Rejected):
            feed(other, answer)


class TestDowngrade:
    def test_a_frame_is_no_opening_and_is_told_so_in_a_frame(self) -> None:
        hello = encode(Hello("a", "0" * 64, "worker-1", by_reference=True))
        frame = Header(Kind.HELLO, length=len(hello)).pack() + hello
        with pytest.raises(Rejected, match="set PSA_KEY") as caught:
            feed(accepting(), frame)
        header = unpack(caught.value.answer[:HEADER_BYTES])
        assert header.kind is Kind.REFUSED
        assert "set PSA_KEY or PSA_KEY_FILE" in decode(Refusal, caught.value.answer[HEADER_BYTES:]).why

    def test_a_server_without_a_key_says_so_and_the_worker_goes_no_further(self) -> None:
        worker = connecting()
        with pytest.raises(Rejected, match="PSA_KEY") as at_server:
            feed(FirstFrame(), worker.opening)
        with pytest.raises(Rejected, match="the server has no key: set PSA_KEY"):
            feed(worker, at_server.value.answer)
        assert not worker.done

    def test_an_older_server_is_named(self) -> None:
        with pytest.raises(Rejected, match="a release that knows no key"):
            feed(connecting(), Header(Kind.REFUSED, length=10).pack())

    def test_another_format_is_refused_by_both(self) -> None:
        opening = bytearray(connecting().opening)
        opening[4] += 1
        with pytest.raises(Rejected, match="format 2") as at_server:
            feed(accepting(), bytes(opening))
        with pytest.raises(Rejected, match="format"):
            feed(connecting(), at_server.value.answer)

    def test_another_job_is_refused_in_words(self) -> None:
        worker = connecting(job="b")
        with pytest.raises(Rejected, match="another job") as at_server:
            feed(accepting(), worker.opening)
        with pytest.raises(Rejected, match="another job"):
            feed(worker, at_server.value.answer)


class TestFirstFrame:
    def frame(self, kind: Kind, payload: bytes = b"", **fields: int) -> bytes:
        return Header(kind, **{"length": len(payload), **fields}).pack() + payload  # type: ignore[arg-type]

    @given(st.binary(max_size=HELLO_BYTES_MAX), st.lists(st.integers(1, 40)))
    def test_hello_comes_whole_and_nothing_after_it_is_read(self, payload: bytes, sizes: list[int]) -> None:
        side = FirstFrame()
        feed(side, self.frame(Kind.HELLO, payload) + b"the next frame", sizes)
        assert side.done and side.payload == payload
        assert side.header is not None and side.header.kind is Kind.HELLO

    def test_inspect_is_its_header(self) -> None:
        side = FirstFrame()
        feed(side, self.frame(Kind.INSPECT))
        assert side.done

    @pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.HELLO, Kind.INSPECT)])
    def test_no_other_kind_comes_first(self, kind: Kind) -> None:
        with pytest.raises(Rejected, match=f"{kind.name} before HELLO"):
            feed(FirstFrame(), self.frame(kind))

    def test_more_than_a_small_buffer_is_refused_before_a_byte_of_it_is_read(self) -> None:
        with pytest.raises(Rejected, match="announces 1048576 bytes"):
            feed(FirstFrame(), self.frame(Kind.HELLO, length=1 << 20))

    def test_the_longest_names_fit(self) -> None:
        hello = Hello("j" * 100, "0" * 64, "w" * 100, by_reference=True)
        assert len(encode(hello)) <= HELLO_BYTES_MAX

    def test_mutated_frames_are_rejected_or_are_frames(self) -> None:
        rng = random.Random(16)
        hello = encode(Hello("a", "0" * 64, "worker-1", by_reference=True))
        whole = self.frame(Kind.HELLO, hello)
        for _ in range(2000):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            side = FirstFrame()
            try:
                feed(side, bytes(data))
            except Rejected as error:
                assert len(error.answer) < 1000
            assert side.wanted <= HELLO_BYTES_MAX
