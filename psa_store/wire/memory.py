"""Memory that processes of one host share, so that a push or a pull between them moves a header and no tensor.

Two kinds, both of the kernel's making and freed with the last process that has them, however it dies:

* :class:`SharedMemory`, a memfd. The process that fills it makes it, sealed against shrinking, and passes its
  descriptor once over a Unix socket; a reader attaches to it copy-on-write, so it cannot change what it reads.
* :class:`Window`, one range of addresses whose parts show other processes' memory or own memory. What a part
  shows can change at any time; the addresses stay, so tensors that lie in it never have to be moved.

The only file that knows mmap's flags. Linux only where it says so; not thread-safe.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from psa_store.errors import Refused
from psa_store.job.layout import PAGE_BYTES as LAYOUT_PAGE_BYTES
from psa_store.job.parts import Parts

PAGE_BYTES = mmap.PAGESIZE
_MAP_FIXED = 0x10
_PAGEMAP_PATH = "/proc/self/pagemap"
_PAGEMAP_ENTRY_BYTES = 8
_PRESENT = 1 << 63
_SWAPPED = 1 << 62
_OF_FILE = 1 << 61
_COPY_BYTES = 1 << 20


class SharedMemory:
    """``size_bytes`` of zeros that can be passed to other processes of this host, or what one of them passed.

    What this process makes is mapped here when it is asked for: the whole, or some ranges.
    """

    def __init__(self, fd: int | None, mapping: mmap.mmap | None, size_bytes: int) -> None:
        self._fd = fd
        self._mapping = mapping
        self._size_bytes = size_bytes

    @classmethod
    def create(cls, name: str, size_bytes: int) -> SharedMemory:
        """Own memory. Where there is no memfd (not Linux) it works, but cannot be passed."""
        size_bytes = max(PAGE_BYTES, size_bytes)
        if sys.platform != "linux":
            return cls(None, mmap.mmap(-1, size_bytes), size_bytes)
        fd = os.memfd_create(f"psa-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            return cls(fd, None, size_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, size_bytes: int, low: int = 0) -> SharedMemory:
        """Map what a peer passed, for reading; takes over ``fd``. ``low``: the byte with which it begins here, that of
        a page.

        Raises:
            Refused: it is smaller than ``size_bytes``, or could shrink while it is mapped.
        """
        try:
            size_bytes = max(PAGE_BYTES, size_bytes)
            _check_passed(fd, size_bytes)
            length = size_bytes - low
            return cls(None, mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=low), length)
        except OSError as error:
            raise Refused(f"memory was passed that cannot be mapped: {error}") from error
        finally:
            os.close(fd)

    @property
    def fd(self) -> int:
        """The descriptor to pass."""
        assert self._fd is not None
        return self._fd

    @property
    def buffer(self) -> mmap.mmap:
        """For ``torch.frombuffer``. The memory lives as long as anything that was made from it."""
        if self._mapping is None:
            self._mapping = mmap.mmap(self.fd, self._size_bytes)
        return self._mapping

    def part(self, low: int, high: int) -> mmap.mmap | memoryview:
        """As :attr:`buffer`, but from ``low``, a multiple of a page, to ``high`` only, or to the end."""
        high = min(high, self._size_bytes)
        if self._fd is None:
            return memoryview(self.buffer)[low:high]
        return mmap.mmap(self._fd, high - low, offset=low)

    def discard(self, low: int, high: int) -> None:
        """Let whole pages go, of all processes that have this memory: they are zeros again (Linux only)."""
        part = self.part(low, high)
        if isinstance(part, mmap.mmap) and sys.platform == "linux":
            part.madvise(mmap.MADV_REMOVE)

    def copy_on_write(self, low: int, high: int) -> CopyOnWrite:
        """The same part once more, to be written to without effect here."""
        if self._fd is None:
            return CopyOnWrite(self.part(low, high))
        length = min(high, self._size_bytes) - low
        return CopyOnWrite(mmap.mmap(self._fd, length, access=mmap.ACCESS_COPY, offset=low))

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


class PassedMemory:
    """Memory that a peer passed, to be passed on: it is not mapped. Takes over ``fd``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def check(self, size_bytes_max: int) -> None:
        """Raise Refused if it is larger than this, or no memory that stays as large as it is."""
        _check_passed(self.fd, 0)
        size = os.fstat(self.fd).st_size
        if size > size_bytes_max:
            raise Refused(f"memory of {size} bytes was passed; at most {size_bytes_max} are possible")

    def attach(self) -> SharedMemory:
        """Map it, for reading; raises Refused if it was not checked and could shrink."""
        return SharedMemory.attach(os.dup(self.fd), os.fstat(self.fd).st_size)

    def __del__(self) -> None:
        os.close(self.fd)


Passable = SharedMemory | PassedMemory


class CopyOnWrite:
    """Shows memory; what is written to it stays in it and hides the original, page by page (Linux only; else it is the
    original)."""

    def __init__(self, mapping: mmap.mmap | memoryview) -> None:
        self.buffer = mapping
        """For ``torch.frombuffer``."""

    def forget(self) -> None:
        """Show the original everywhere again."""
        if isinstance(self.buffer, mmap.mmap) and sys.platform == "linux":
            self.buffer.madvise(mmap.MADV_DONTNEED)


class Window:
    """A range of private memory for ``parts`` of an arena, which may show memory of other processes (Linux only).

    What is written to a shown part stays private and hides the original page by page; :meth:`refresh` undoes it.
    Ranges are in bytes of the arena, in whole parts.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        if sys.platform == "linux":
            self._mapping = mmap.mmap(-1, parts.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._mapping = mmap.mmap(-1, parts.size_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._shown: dict[str, _Shown] = {}
        self._pagemap = os.open(_PAGEMAP_PATH, os.O_RDONLY | os.O_CLOEXEC) if can_show() else -1

    def close(self) -> None:
        """Own memory everywhere, as it looks now; it stays for as long as tensors use it. Idempotent."""
        for name in list(self._shown):
            shown = self._shown.pop(name)
            for low, high in shown.ranges:
                for start in range(low, high, _COPY_BYTES):  # a copy of the whole would need its memory once more
                    end = min(start + _COPY_BYTES, high)
                    here = slice(self._parts.place(start), self._parts.place(start) + end - start)
                    kept = self._mapping[here]
                    self._map(start, end, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
                    self._mapping[here] = kept
            os.close(shown.fd)
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1

    @property
    def buffer(self) -> mmap.mmap:
        """For ``torch.frombuffer``. The range lives as long as anything that was made from it."""
        return self._mapping

    @property
    def shows(self) -> bool:
        """Whether any part shows memory of another process."""
        return bool(self._shown)

    def show(self, name: str, fd: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Show these ranges of the arena, which is a descriptor's memory; takes over ``fd``.

        ``name``: whose memory it is; what was shown of the same before is closed, and must have had the same ranges.

        Raises:
            Refused: the descriptor's memory ends too early, or could shrink while it is mapped.
        """
        try:
            _check_passed(fd, max((high for _, high in ranges), default=0))
        except Refused:
            os.close(fd)
            raise
        former = self._shown.pop(name, None)
        if former is not None:
            os.close(former.fd)
        self._shown[name] = _Shown(fd, ranges, [self._page_entries(low, high) for low, high in ranges])
        for low, high in ranges:
            self._map(low, high, mmap.MAP_PRIVATE, fd)

    def hide(self) -> None:
        """Own memory everywhere again, with zeros where something was shown."""
        for name in list(self._shown):
            shown = self._shown.pop(name)
            for low, high in shown.ranges:
                self._map(low, high, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            os.close(shown.fd)

    def refresh(self) -> bool:
        """Show the originals again where this process wrote to them; True if it had.

        Source: the kernel's ``admin-guide/mm/pagemap``: bit 61 is clear in private copies of a file's pages.
        """
        written = False
        for shown in self._shown.values():
            for (low, high), entries in zip(shown.ranges, shown.entries, strict=True):
                if self._is_written(entries):
                    written = True
                    self._map(low, high, mmap.MAP_PRIVATE, shown.fd)
        return written

    def _page_entries(self, low: int, high: int) -> slice:
        """Where the kernel tells of the pages of a range."""
        first = (self._address + self._parts.place(low)) // PAGE_BYTES
        last = first + (_round_up(high) - low) // PAGE_BYTES
        return slice(first * _PAGEMAP_ENTRY_BYTES, last * _PAGEMAP_ENTRY_BYTES)

    def _is_written(self, entries: slice) -> bool:
        import numpy as np  # not above: `psa status` talks to servers, and would wait for this import

        of_file = np.uint64(_OF_FILE)
        pages = np.empty((entries.stop - entries.start) // _PAGEMAP_ENTRY_BYTES, dtype=np.uint64)
        if os.preadv(self._pagemap, [pages.data.cast("B")], entries.start) != pages.nbytes:
            return True
        if np.bitwise_and.reduce(pages) & of_file:
            return False  # the usual case, cheaply: every page is there and is the original
        here = pages & np.uint64(_PRESENT | _SWAPPED) != 0
        return bool(np.any(here & (pages & of_file == 0)))

    def _map(self, low: int, high: int, flags: int, fd: int) -> None:
        assert (
            low % PAGE_BYTES == 0 and low < high and self._parts.place(high - 1) - self._parts.place(low) < high - low
        )
        address, length = self._address + self._parts.place(low), _round_up(high) - low
        offset = 0 if fd < 0 else low
        got = _libc().mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags | _MAP_FIXED, fd, offset)
        if got != address:
            raise MemoryError(f"mmap of {length} bytes: {os.strerror(ctypes.get_errno())}")


@dataclass(frozen=True, slots=True)
class _Shown:
    fd: int
    ranges: Sequence[tuple[int, int]]
    entries: Sequence[slice]
    """By range, the bytes of the page map that tell of it: asked in each step."""


def can_show() -> bool:
    """Whether :class:`Window` can show memory here, and can tell when it was written to."""
    return sys.platform == "linux" and PAGE_BYTES <= LAYOUT_PAGE_BYTES and os.access(_PAGEMAP_PATH, os.R_OK)


def _check_passed(fd: int, size_bytes: int) -> None:
    """Refuse a descriptor whose memory is smaller than promised or may become so."""
    try:
        size = os.fstat(fd).st_size
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise Refused(f"a descriptor was passed that is no sealed memory: {error}") from error
    if size < size_bytes:
        raise Refused(f"memory of {size} bytes was passed where {size_bytes} are needed")
    if not seals & fcntl.F_SEAL_SHRINK:
        raise Refused("memory was passed that may shrink: it is not sealed")


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    return libc
