"""Shared memory: an owner's writes are seen at once, a reader's stay private, and what could hurt us is refused."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psa_store.errors import Refused
from psa_store.job.parts import parts_of
from psa_store.wire import SharedMemory, Window, can_show
from psa_store.wire.memory import PAGE_BYTES

# A memfd, its seals and /proc/self/pagemap exist there only; elsewhere the product sends everything by value.
pytestmark = pytest.mark.skipif(sys.platform != "linux" or not can_show(), reason="memory is shared on Linux only")

PAGES = 4
SIZE = PAGES * PAGE_BYTES
ROUNDS = 200


def filled(byte: bytes, size_bytes: int = SIZE) -> SharedMemory:
    memory = SharedMemory.create("test", size_bytes)
    memory.buffer[:] = byte * len(memory.buffer)
    return memory


def passed(memory: SharedMemory) -> int:
    """A descriptor as a peer gets it: another number for the same memory."""
    return os.dup(memory.fd)


def attached_to(memory: SharedMemory) -> SharedMemory:
    return SharedMemory.attach(passed(memory), SIZE)


def window_on(memory: SharedMemory) -> Window:
    window = Window(parts_of([(0, SIZE)]))
    window.show("owner", passed(memory), [(0, SIZE)])
    return window


def resources() -> tuple[int, int]:
    """How many descriptors and how many mappings this process has."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def address_of(window: Window) -> int:
    return torch.frombuffer(window.buffer, dtype=torch.uint8).data_ptr()


class TestVisibility:
    @pytest.mark.parametrize("reader_of", [attached_to, window_on])
    def test_what_the_owner_writes_is_seen_at_once(
        self, reader_of: Callable[[SharedMemory], SharedMemory | Window]
    ) -> None:
        memory = filled(b"a")
        reader = reader_of(memory)
        assert reader.buffer[:] == b"a" * SIZE
        memory.buffer[PAGE_BYTES : 2 * PAGE_BYTES] = b"b" * PAGE_BYTES
        assert reader.buffer[:] == b"a" * PAGE_BYTES + b"b" * PAGE_BYTES + b"a" * (SIZE - 2 * PAGE_BYTES)

    @pytest.mark.parametrize("writer_of", [attached_to, window_on])
    def test_what_a_reader_writes_stays_private(
        self, writer_of: Callable[[SharedMemory], SharedMemory | Window]
    ) -> None:
        memory = filled(b"a")
        writer, others = writer_of(memory), [attached_to(memory), window_on(memory)]
        writer.buffer[:] = b"x" * SIZE
        assert writer.buffer[:] == b"x" * SIZE
        assert all(each.buffer[:] == b"a" * SIZE for each in (memory, *others))

    def test_new_memory_is_zero_and_at_least_as_large_as_asked(self) -> None:
        for size_bytes in (0, 1, PAGE_BYTES, PAGE_BYTES + 1):
            memory = SharedMemory.create("test", size_bytes)
            assert len(memory.buffer) >= max(1, size_bytes) and not any(memory.buffer[:])

    def test_what_was_attached_outlives_its_owner(self) -> None:
        memory = filled(b"a")
        reader, window = attached_to(memory), window_on(memory)
        del memory
        gc.collect()
        assert reader.buffer[:] == window.buffer[:] == b"a" * SIZE

    def test_two_sources_lie_side_by_side(self) -> None:
        """As two servers whose shards take turns in the arena."""
        left, right = filled(b"l"), filled(b"r")
        window = Window(parts_of([(0, SIZE)]))
        window.buffer[2 * PAGE_BYTES : 3 * PAGE_BYTES] = b"o" * PAGE_BYTES
        window.show("left", passed(left), [(0, PAGE_BYTES), (3 * PAGE_BYTES, SIZE)])
        window.show("right", passed(right), [(PAGE_BYTES, 2 * PAGE_BYTES)])
        assert [window.buffer[page * PAGE_BYTES] for page in range(PAGES)] == list(b"lrol")
        left.buffer[:] = b"L" * SIZE
        assert [window.buffer[page * PAGE_BYTES] for page in range(PAGES)] == list(b"LroL")

    def test_each_range_shows_the_same_place_of_its_source(self) -> None:
        memory = SharedMemory.create("test", SIZE)
        for page in range(PAGES):
            memory.buffer[page * PAGE_BYTES] = page + 1
        window = Window(parts_of([(0, SIZE)]))
        window.show("owner", passed(memory), [(PAGE_BYTES, 2 * PAGE_BYTES), (3 * PAGE_BYTES, SIZE)])
        window.buffer[PAGE_BYTES + 1] = 7
        assert window.refresh()
        assert [window.buffer[page * PAGE_BYTES] for page in range(PAGES)] == [0, 2, 0, 4]

    def test_a_range_may_end_within_a_page(self) -> None:
        memory = filled(b"a", SIZE - 100)
        window = Window(parts_of([(0, SIZE - 100)]))
        window.show("owner", passed(memory), [(PAGE_BYTES, SIZE - 100)])
        assert window.buffer[PAGE_BYTES : SIZE - 100] == b"a" * (SIZE - 100 - PAGE_BYTES)
        window.buffer[SIZE - 101] = 0
        assert window.refresh() and window.buffer[SIZE - 101] == ord("a")

    def test_a_source_of_the_same_name_is_replaced(self) -> None:
        old, new = filled(b"a"), filled(b"b")
        window = window_on(old)
        address, before = address_of(window), descriptors()
        window.show("owner", passed(new), [(0, SIZE)])
        assert window.buffer[:] == b"b" * SIZE and address_of(window) == address
        assert descriptors() == before, "the descriptor of what was replaced is still open"
        old.buffer[:] = b"x" * SIZE
        assert window.buffer[:] == b"b" * SIZE


class TestRefresh:
    @given(st.lists(st.tuples(st.sampled_from(["read", "write", "publish"]), st.integers(0, SIZE - 1)), max_size=12))
    def test_it_undoes_what_was_written_and_says_whether_anything_was(self, deeds: list[tuple[str, int]]) -> None:
        memory = filled(b"a")
        window = window_on(memory)
        for deed, place in deeds:
            if deed == "publish":
                memory.buffer[place] = ord("p")
            elif deed == "write":
                window.buffer[place] = ord("w")
            else:
                assert window.buffer[place] in b"apw"
        address = address_of(window)
        assert window.refresh() is any(deed == "write" for deed, _ in deeds)
        assert window.buffer[:] == memory.buffer[:] and address_of(window) == address
        assert not window.refresh(), "it was undone already"
        window.close()

    def test_the_other_sources_and_our_own_memory_are_left_alone(self) -> None:
        written, clean = filled(b"w"), filled(b"c")
        window = Window(parts_of([(0, SIZE)]))
        window.show("written", passed(written), [(0, PAGE_BYTES)])
        window.show("clean", passed(clean), [(PAGE_BYTES, 2 * PAGE_BYTES)])
        window.buffer[0] = window.buffer[SIZE - 1] = ord("x")
        assert window.refresh()
        assert [window.buffer[place] for place in (0, PAGE_BYTES, SIZE - 1)] == list(b"wcx")

    def test_memory_of_our_own_is_nothing_to_undo(self) -> None:
        window = Window(parts_of([(0, SIZE)]))
        window.buffer[:] = b"x" * SIZE
        assert not window.refresh() and window.buffer[:] == b"x" * SIZE


def unsealed() -> int:
    return memfd(SIZE, 0)


def sealed_against_growing_only() -> int:
    return memfd(SIZE, fcntl.F_SEAL_GROW)


def too_small() -> int:
    return memfd(SIZE - PAGE_BYTES, fcntl.F_SEAL_SHRINK)


def without_a_byte() -> int:
    return memfd(0, fcntl.F_SEAL_SHRINK)


def regular_file() -> int:
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(fd, SIZE)
    return fd


def pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def memfd(size_bytes: int, seals: int) -> int:
    fd = os.memfd_create("psa-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class TestRefusals:
    @pytest.mark.parametrize(
        ("pass_what", "words"),
        [
            (too_small, f"{SIZE - PAGE_BYTES} bytes was passed where {SIZE} are needed"),
            (without_a_byte, "0 bytes was passed"),
            (unsealed, "not sealed"),
            (sealed_against_growing_only, "not sealed"),
            (regular_file, "no sealed memory"),
            (pipe, "no sealed memory"),
        ],
    )
    def test_unfit_memory_is_refused_and_its_descriptor_closed(self, pass_what: Callable[[], int], words: str) -> None:
        memory = filled(b"a")
        window, before = window_on(memory), resources()
        with pytest.raises(Refused, match=words):
            SharedMemory.attach(pass_what(), SIZE)
        with pytest.raises(Refused, match=words):
            window.show("owner", pass_what(), [(PAGE_BYTES, SIZE)])
        assert resources() == before
        assert window.buffer[:] == b"a" * SIZE, "a refusal changed what the window shows"

    @pytest.mark.parametrize("size_bytes", [0, 100])
    def test_memory_that_is_smaller_than_a_page_is_refused_although_no_more_is_needed(self, size_bytes: int) -> None:
        """A model may be that small: its arena is one page nevertheless, and a mapping of one is what we make."""
        before = resources()
        with pytest.raises(Refused):
            SharedMemory.attach(memfd(size_bytes, fcntl.F_SEAL_SHRINK), size_bytes // 2)
        assert resources() == before

    def test_memory_that_the_kernel_does_not_let_us_read_is_refused(self) -> None:
        """It is sealed and large enough, so only mmap finds out; a stranger must get no other error for it."""
        memory = filled(b"a")
        before = resources()
        with pytest.raises(Refused):
            SharedMemory.attach(os.open(f"/proc/self/fd/{memory.fd}", os.O_WRONLY), SIZE)
        assert resources() == before

    def test_its_owner_cannot_shrink_what_was_passed(self) -> None:
        memory = filled(b"a")
        reader, window = attached_to(memory), window_on(memory)
        for size_bytes in (0, SIZE - 1, SIZE + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, size_bytes)
        assert reader.buffer[:] == window.buffer[:] == b"a" * SIZE


class TestEnds:
    def test_hidden_parts_are_zero_at_the_same_place_and_the_rest_stays(self) -> None:
        memory = filled(b"a")
        window = Window(parts_of([(0, SIZE)]))
        window.buffer[:] = b"o" * SIZE
        window.show("owner", passed(memory), [(PAGE_BYTES, 2 * PAGE_BYTES)])
        tensor = torch.frombuffer(window.buffer, dtype=torch.uint8)
        assert window.shows
        window.hide()
        assert not window.shows and address_of(window) == tensor.data_ptr()
        assert bytes(tensor.tolist()) == b"o" * PAGE_BYTES + bytes(PAGE_BYTES) + b"o" * (SIZE - 2 * PAGE_BYTES)
        memory.buffer[:] = b"x" * SIZE
        assert tensor[PAGE_BYTES] == 0
        tensor.fill_(7)
        assert memory.buffer[:] == b"x" * SIZE

    def test_a_closed_window_keeps_its_contents_at_the_same_place(self) -> None:
        memory = filled(b"a")
        window = window_on(memory)
        window.buffer[0] = ord("w")
        address = address_of(window)
        window.close()
        window.close()
        memory.buffer[:] = b"x" * SIZE
        assert window.buffer[:] == b"w" + b"a" * (SIZE - 1)
        assert address_of(window) == address and not window.shows

    def test_tensors_outlive_the_window_and_what_it_showed(self) -> None:
        memory = filled(b"a")
        window = window_on(memory)
        tensor = torch.frombuffer(window.buffer, dtype=torch.uint8)
        view = tensor[PAGE_BYTES:].view(torch.float32)
        window.close()
        del window, memory
        gc.collect()
        assert bytes(tensor.tolist()) == b"a" * SIZE
        view.fill_(1.0)
        assert float(view.sum()) == view.numel() and tensor[0] == ord("a")


class TestNothingLeaks:
    def test_showing_hiding_and_closing(self) -> None:
        memory = filled(b"a")
        kept = Window(parts_of([(0, SIZE)]))

        def once() -> None:
            gone = window_on(memory)
            kept.show("owner", passed(memory), [(0, PAGE_BYTES), (2 * PAGE_BYTES, SIZE)])
            for window in (kept, gone):
                window.buffer[0] = 1
                assert window.refresh()
            kept.hide()
            gone.close()

        check_that_nothing_piles_up(once)

    def test_making_and_attaching(self) -> None:
        def once() -> None:
            memory = filled(b"a")
            reader = attached_to(memory)
            assert torch.frombuffer(reader.buffer, dtype=torch.uint8)[0] == ord("a")

        check_that_nothing_piles_up(once)


def check_that_nothing_piles_up(once: Callable[[], None]) -> None:
    for _ in range(3):  # what is made once and kept: caches, arenas of malloc
        once()
    before = resources()
    for _ in range(ROUNDS):
        once()
    assert resources() == before
