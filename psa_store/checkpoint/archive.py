"""The folder in which automatic checkpoints are kept as files: one folder of the job, one folder in it for each.

What is kept there does not depend on Redis, whose loss it is for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from psa_store import telemetry
from psa_store.checkpoint.catalog import is_automatic
from psa_store.checkpoint.export import MANIFEST, Export, export_version, newest_export, open_export
from psa_store.checkpoint.files import Folder
from psa_store.checkpoint.version import stored_version
from psa_store.errors import DataIntegrity, PsaError, UsageError
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
        """Export a checkpoint, unless that was done; raises as :func:`export_version` does."""
        there = Folder(f"{self.folder}/{name}")
        try:
            return open_export(there.url)
        except (UsageError, DataIntegrity):
            return export_version(stored_version(store, self.job, name), f"{self.folder}/{name}")

    def prune(self, keep: int, older_than_s: float | None) -> list[str]:
        """Remove what was exported by itself but the newest ``keep``, and those of more than this age."""
        folders = {each.url.rpartition("/")[2]: each for each in Folder(self.folder).folders()}
        automatic = sorted(name for name in folders if is_automatic(name))
        oldest = "" if older_than_s is None else time.strftime("%Y%m%d-%H%M%S", time.gmtime(time.time() - older_than_s))
        gone = [name for name in automatic if name not in automatic[-keep:] or name < oldest]
        for name in gone:
            folders[name].remove_all(MANIFEST)  # without it, what is left is no export
        return gone

    def newest(self) -> Export:
        """The newest that is whole; says which were passed over. Raises DataIntegrity if there is none."""
        log = telemetry.get_logger()
        try:
            export, passed = newest_export(self.folder, self.job)
        except PsaError as error:
            raise DataIntegrity(f"no checkpoint of job {self.job!r} can be restored: {error}") from error
        for folder, why in passed:
            log.warning("a checkpoint is passed over", folder=folder, why=why)
        if export is None:
            raise DataIntegrity(f"no whole checkpoint of job {self.job!r} is in {self.folder}")
        return export
