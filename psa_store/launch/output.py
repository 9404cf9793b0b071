"""What the processes of a run print: each line marked with its process, and kept in a file of that process.

A child writes into pipes of its own; a thread for each reads them here, and writes whole lines. The child holds the
reading end as well: if the supervisor is killed, the child's last lines find no reader, and must not fail for that.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import select
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from io import FileIO
from multiprocessing.connection import Connection
from pathlib import Path

from psa_store import logs
from psa_store.errors import UsageError
from psa_store.launch.lines import LINE_BYTES_MAX, LineCutter

_READ_BYTES = 1 << 16
_PIPE_BYTES = 1 << 20
"""So much may a process print while the supervisor is paused."""
_POLL_S = 0.1
_CLOSE_S = 5.0
_COLOURS = (36, 33, 32, 35, 34, 31)
_OUT, _ERROR = 1, 2
_WRITING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Pipe:
    """A pipe on its way to a child: what the child writes to ``streams`` goes into it."""

    reader: Connection
    writer: Connection
    streams: tuple[int, ...]

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


def redirect(pipes: Sequence[Pipe]) -> None:
    """In the child: write standard output and standard error into the pipes, line by line."""
    for pipe in pipes:
        for stream in pipe.streams:
            os.dup2(pipe.writer.fileno(), stream)
        pipe.writer.close()
        _KEPT.append(pipe.reader)
    if pipes and sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


_KEPT: list[Connection] = []
"""Reading ends that live as long as the process."""


class Output:
    """Where the lines of children go. ``label``: show whose they are; ``folder``: keep them there, too.

    Thread-safe once it is made.
    """

    def __init__(self, *, label: bool, folder: Path | None) -> None:
        self._label = label
        self._folder = folder
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self.broken = False
        """Nothing takes the lines any more: the pager was left, or the terminal closed."""
        if folder is not None:
            _make_folder(folder)

    def pipes(self) -> list[Pipe]:
        """Make the pipes of one child: two, or one where both streams go to the same place, so that order is kept."""
        each: Sequence[tuple[int, ...]] = [(_OUT, _ERROR)] if _same_place() else [(_OUT,), (_ERROR,)]
        made = []
        for streams in each:
            reader, writer = multiprocessing.Pipe(duplex=False)
            with suppress(AttributeError, OSError):  # Linux, within the user's limit
                fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            made.append(Pipe(reader, writer, streams))
        return made

    def follow(self, name: str, number: int, pipes: Sequence[Pipe]) -> Followed:
        """Read what the child writes, from now on; ``name`` marks its lines."""
        threads = []
        for pipe in pipes:
            pipe.writer.close()
            thread = threading.Thread(
                target=self._read, args=(name, number, pipe), name=f"psa-output-{name}", daemon=True
            )
            thread.start()
            threads.append(thread)
        self._threads = [each for each in self._threads if each.is_alive()] + threads
        return Followed(tuple(threads))

    def close(self) -> None:
        """Write what has been printed until now, and stop reading."""
        self._ending.set()
        end_s = time.monotonic() + _CLOSE_S  # standard output may be a pager that reads no further
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _read(self, name: str, number: int, pipe: Pipe) -> None:
        target, cutter = pipe.streams[0], LineCutter()
        mark = _mark(name, number, target) if self._label else b""
        path = None if self._folder is None else self._folder / f"{name}.log"
        with pipe.reader, closing(_LogFile(path)) as file:
            for data in self._data(pipe.reader.fileno()):
                file.write(data)
                if self._label:
                    self._show(target, mark, cutter.feed(data, time.monotonic()))
                else:
                    self._write(target, data)
            self._show(target, mark, cutter.end())

    def _show(self, stream: int, mark: bytes, lines: Sequence[bytes]) -> None:
        for line in lines:
            self._write(stream, b"%s%s\n" % (mark, line))

    def _write(self, stream: int, data: bytes) -> None:
        left = memoryview(data)
        with _WRITING:
            while left and not self.broken:
                try:
                    left = left[os.write(stream, left) :]
                except BlockingIOError:  # another program has made the terminal so
                    select.select([], [stream], [])
                except OSError as error:
                    self.broken = error.errno in (errno.EPIPE, errno.EIO)
                    return  # a full disk, or a stream that the caller closed: training goes on

    def _data(self, reader: int) -> Iterator[bytes]:
        while True:
            # A process that the child started may hold the pipe for longer than the child lives.
            if not select.select([reader], [], [], _POLL_S)[0]:
                if self._ending.is_set():
                    return
                continue
            data = os.read(reader, _READ_BYTES)
            if not data:
                return
            yield data


@dataclass(frozen=True, slots=True)
class Followed:
    """What reads the output of one child."""

    threads: tuple[threading.Thread, ...] = ()

    def drain(self) -> None:
        """Wait until what the child printed, which has ended, is shown; not for long."""
        for thread in self.threads:
            thread.join(_POLL_S)


class _LogFile:
    """The file of one process, to which every start of it adds. A full disk costs lines, not the run.

    Standard output and standard error may come by two pipes, so a line is written when it is whole.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._rest = b""
        self._missing = False

    def write(self, data: bytes) -> None:
        if self._path is None:
            return
        data = self._rest + data
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if len(data) - end > LINE_BYTES_MAX:
            end = len(data)
        self._rest = data[end:]
        self._append(data[:end])

    def _append(self, data: bytes) -> None:
        assert self._path is not None
        try:
            if self._file is None:
                self._file = FileIO(self._path, "ab")
            self._file.write(data)
            self._missing = False
        except OSError as error:
            if not self._missing:
                logs.get_logger().warning("lines are missing in a log file", path=str(self._path), why=str(error))
            self._missing = True

    def close(self) -> None:
        if self._rest:
            self._append(self._rest + b"\n")
        if self._file is not None:
            self._file.close()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"log folder {folder}: {error.strerror}. Name a folder that can be written to.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"log folder {folder}: it can not be written to. Name another one.")


def _mark(name: str, number: int, stream: int) -> bytes:
    if os.isatty(stream) and "NO_COLOR" not in os.environ:
        return f"\x1b[{_COLOURS[number % len(_COLOURS)]}m[{name}]\x1b[0m ".encode()
    return f"[{name}] ".encode()


def _same_place() -> bool:
    """Whether standard output and standard error are one terminal, file or pipe."""
    try:
        out, error = os.fstat(_OUT), os.fstat(_ERROR)
    except OSError:
        return False
    return (out.st_dev, out.st_ino) == (error.st_dev, error.st_ino)
