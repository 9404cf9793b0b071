"""The document that says how a job walks through its data: the only one of a job that is replaced.

By compare-and-set, so that of processes that change it at the same time one wins, and the others see it.
"""

from __future__ import annotations

from psa_store.errors import DataIntegrity
from psa_store.job.document import Damaged, from_text, judged, to_text
from psa_store.job.position import DataRecord
from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.connection import text


class StoredDataRecord:
    """That of one job. Thread-safe. ``caller`` stays the store's."""

    def __init__(self, caller: Caller, job: str) -> None:
        self._caller = caller
        self._job = job
        self._key = keys.data(job)

    def read(self) -> tuple[bytes | str, DataRecord | None]:
        """What is stored now, as bytes and as what they say; None if nothing is.

        Raises:
            DataIntegrity: it is damaged. Servers that know better write it again, within about a second.
        """
        seen, found = self.look()
        if isinstance(found, Damaged):
            raise DataIntegrity(
                f"{found.where} in Redis is damaged, and no server that lives knows better: {found.why}"
            )
        return seen, found

    def look(self) -> tuple[bytes | str, DataRecord | Damaged | None]:
        """The same; what is damaged is a value."""
        found = self._caller.retrying(lambda: self._caller.client.get(self._key))
        if found is None:
            return "", None
        what = f"job {self._job!r}: how it reads its data"
        return found, judged(lambda stored: from_text(DataRecord, stored, what), text(found), self._key)

    def replace(self, seen: bytes | str, record: DataRecord) -> bool:
        """Store ``record`` if the text that was read is still there; False if not: read again. Idempotent."""
        (reply,) = self._caller.functions([("psa_replace", [self._key], [seen, to_text(record)])])
        return bool(reply[0] == b"ok")
