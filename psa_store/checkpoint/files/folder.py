"""Files of a folder at any fsspec URL: written under a temporary name, synced, and renamed when all of them are whole.

The only place of this room that touches files. A local disk is asked to begin writing while we go on, so that the sync
at the end has little left to do, and its folders are synced, too; elsewhere a file is safe when it is closed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from xxhash import xxh3_128

from psa_store.errors import DependencyUnreachable, PsaError, UsageError
from psa_store.logs import hide_passwords

_TEMPORARY = ".tmp-"
_BLOCK_BYTES = 4 << 20
_WRITE_OUT_BYTES = 32 << 20
"""How much of a local file is written before the disk is asked to begin with it."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a whole file must be like."""

    name: str
    size_bytes: int
    xxh3_128: str
    """Digest of all its bytes."""


class Folder:
    """A folder, which need not exist yet. Thread-safe, as far as its file system is.

    Methods raise UsageError if something that they need is not there or not allowed, DependencyUnreachable if the
    file system fails.
    """

    def __init__(self, url: str) -> None:
        with _translated(url):
            try:
                self._fs, self._path = fsspec.core.url_to_fs(url)
            except (ImportError, ValueError) as error:
                why = f"{error}. Use a path or a URL of which fsspec knows the file system."
                raise UsageError(hide_passwords(f"{url}: {why}")) from error
        self.url = url.rstrip("/") or "/"
        self._local = isinstance(self._fs, LocalFileSystem)

    def names(self) -> list[str]:
        """Names of the files in it; none if there is no such folder."""
        return self._listed("file")

    def folders(self) -> list[Folder]:
        """The folders in it."""
        return [Folder(f"{self.url}/{name}") for name in self._listed("directory")]

    def make(self) -> None:
        """See to it that it exists."""
        with _translated(self.url):
            made = {self._path, *self._missing()} if self._local else set()
            self._fs.makedirs(self._path, exist_ok=True)
            for parent in {os.path.dirname(folder) for folder in made}:
                _sync_folder(parent)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file; fewer if it is shorter."""
        with _translated(f"{self.url}/{name}"):
            return bytes(self._fs.cat_file(self._of(name), start=start, end=end))

    def facts(self, name: str) -> FileFacts:
        """Read a whole file, to see what it is like."""
        total, size, block = xxh3_128(), 0, memoryview(bytearray(_BLOCK_BYTES))
        with _translated(f"{self.url}/{name}"), self._fs.open(self._of(name), "rb") as file:
            while count := file.readinto(block):
                total.update(block[:count])
                size += count
        return FileFacts(name, size, total.hexdigest())

    def remove(self, name: str) -> None:
        with _translated(f"{self.url}/{name}"):
            self._fs.rm_file(self._of(name))

    def remove_all(self, first: str) -> None:
        """Remove the folder, if it is there, and what is in it, ``first`` before all else."""
        if first in self.names():
            self.remove(first)
        with _translated(self.url), suppress(FileNotFoundError):
            self._fs.rm(self._path, recursive=True)

    @contextmanager
    def draft(self, name: str) -> Iterator[Draft]:
        """Write a file under a temporary name; finish it and publish it inside, else it is gone afterwards."""
        with _translated(f"{self.url}/{name}"):
            temporary = f"{name}{_TEMPORARY}{secrets.token_hex(4)}"
            path = self._of(temporary)
            file = open(path, "xb") if self._local else self._fs.open(path, "wb")  # noqa: SIM115 - closed by the draft
        draft = Draft(name, temporary, f"{self.url}/{name}", file, self._local)
        try:
            yield draft
        except BaseException:
            draft.abandon()
            with suppress(Exception):
                self._fs.rm_file(path)
            raise

    def publish(self, drafts: Sequence[Draft]) -> None:
        """Give finished drafts their names, in this order."""
        for draft in drafts:
            with _translated(f"{self.url}/{draft.name}"):
                self._fs.mv(self._of(draft.temporary), self._of(draft.name))
        if self._local:
            with _translated(self.url):
                _sync_folder(self._path)

    def _missing(self) -> Iterator[str]:
        """Itself and its parents, as far as they must be made; of a local folder."""
        path = self._path
        while not os.path.isdir(path) and path != os.path.dirname(path):
            yield path
            path = os.path.dirname(path)

    def _of(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

    def _listed(self, kind: str) -> list[str]:
        with _translated(self.url):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._path, detail=True)
            except FileNotFoundError:
                return []
        paths = (each["name"].rstrip("/") for each in found if each["type"] == kind)
        return sorted(path.rpartition("/")[2] for path in paths if path != self._path.rstrip("/"))


class Draft:
    """A file that is being written; its name is still to be given. One thread at a time."""

    def __init__(self, name: str, temporary: str, where: str, file: Any, local: bool) -> None:
        self.name = name
        self.temporary = temporary
        self._where = where
        self._file = file
        self._local = local
        self._total = xxh3_128()
        self._size = 0
        self._begun = 0

    @property
    def facts(self) -> FileFacts:
        return FileFacts(self.name, self._size, self._total.hexdigest())

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        with _translated(self._where):
            self._file.write(data)
            self._total.update(data)
            self._size += len(data)
            if self._local and self._size - self._begun >= _WRITE_OUT_BYTES:
                self._file.flush()
                # To Linux, "not needed any more" of what is not on the disk yet means: begin to write it there.
                os.posix_fadvise(self._file.fileno(), self._begun, self._size - self._begun, os.POSIX_FADV_DONTNEED)
                self._begun = self._size

    def finish(self) -> None:
        """Everything is written: make it durable."""
        with _translated(self._where):
            self._file.flush()
            if self._local:
                os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        with suppress(Exception):
            self._file.close()


def is_temporary(name: str) -> bool:
    """Whether this is a file that is being written, or what a writer left that died."""
    return _TEMPORARY in name


def _sync_folder(path: str) -> None:
    descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """Around calls of a file system only: whatever it raises is its failure, since each has errors of its own."""
    try:
        yield
    except PsaError:
        raise
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UsageError(hide_passwords(f"{where}: {_why(error)}")) from error
    except Exception as error:
        raise DependencyUnreachable(
            hide_passwords(f"{where}: {_why(error)}. Try again when it can be used.")
        ) from error


def _why(error: Exception) -> str:
    """In one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
