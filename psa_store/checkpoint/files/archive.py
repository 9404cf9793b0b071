"""The folder in which automatic checkpoints are kept as files: one folder of the job, one folder in it for each.

What is kept there does not depend on Redis, whose loss it is for.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from psa_store import logs
from psa_store.checkpoint.catalog import is_automatic
from psa_store.checkpoint.files.export import (
    export_version,
    list_exports,
    newest_export,
    open_export,
    origin_of,
    ours_in,
)
from psa_store.checkpoint.files.folder import Folder
from psa_store.checkpoint.files.manifest import MANIFEST, Export
from psa_store.checkpoint.reader import open_version
from psa_store.errors import DataIntegrity, PsaError
from psa_store.storage import RedisStore


@dataclass(frozen=True, slots=True)
class Archive:
    """The files of one job below ``url``, a path or any URL of fsspec."""

    url: str
    job: str

    @property
    def folder(self) -> str:
        return f"{self.url.rstrip('/')}/{self.job}"

    def write(self, store: RedisStore, name: str) -> Export:
        """Export a checkpoint, unless that was done; raises as :func:`export_version` does.

        A name may have been used before: what is there of another checkpoint, damaged or not finished goes first, and
        so does what a failure leaves. Other exports stay meanwhile.
        """
        version = open_version(store, self.job, name)
        folder = Folder(f"{self.folder}/{name}")
        if MANIFEST in folder.names():
            with suppress(DataIntegrity):
                there = open_export(folder.url)
                if there.origin == origin_of(version):
                    return there
        beside = version.model_files()
        names = set(beside.contents) if beside else set()
        _clear(folder, names)
        try:
            return export_version(version, folder.url)
        except BaseException:
            with suppress(PsaError):
                if MANIFEST not in folder.names():
                    _clear(folder, names)
            raise

    def prune(self, keep: int, older_than_s: float | None) -> list[str]:
        """Remove what was exported by itself but the newest ``keep``, and those of more than this age.

        The newest that was finished stays, however old it is; what was not goes as soon as there is a newer one.
        """
        folders = {each.url.rpartition("/")[2]: each for each in Folder(self.folder).folders()}
        automatic = sorted(name for name in folders if is_automatic(name))
        done = [name for name in automatic if MANIFEST in folders[name].names()]
        oldest = "" if older_than_s is None else time.strftime("%Y%m%d-%H%M%S", time.gmtime(time.time() - older_than_s))
        stay = {name for name in done[-keep:] if name >= oldest} | set(done[-1:])
        gone = [name for name in automatic if name not in stay and name < max(stay, default="")]
        for name in gone:
            folders[name].remove_all(MANIFEST)  # without it, what is left is no export
        return gone

    def is_empty(self) -> bool:
        """Whether no export was ever begun; raises as :class:`Folder` does if that cannot be seen."""
        return list_exports(self.folder, self.job) == ([], [])

    def last(self) -> Export | None:
        """The one written last by what manifests say: whether it is whole is not looked at."""
        return next(iter(list_exports(self.folder, self.job)[0]), None)

    def newest(self) -> Export:
        """The newest that is whole; says which were passed over. Raises DataIntegrity if there is none."""
        log = logs.get_logger()
        try:
            export, passed = newest_export(self.folder, self.job)
        except PsaError as error:
            raise DataIntegrity(f"no checkpoint of job {self.job!r} can be restored: {error}") from error
        for folder, why in passed:
            log.warning("a checkpoint is passed over", folder=folder, why=why)
        if export is None:
            raise DataIntegrity(f"no whole checkpoint of job {self.job!r} is in {self.folder}")
        return export


def _clear(folder: Folder, beside: Collection[str]) -> None:
    """Remove an export, or what is left of one with these files beside tensors; what others have put there stays."""
    if not folder.folders() and set(folder.names()) <= ours_in(folder) | set(beside):
        folder.remove_all(MANIFEST)
