"""The configuration and the layout of a job in Redis, for processes that know them and write them again.

They are written once, when the job is created; a configuration is replaced when it is changed (see ``redis_store.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from psa_store.job.document import Damaged, judged
from psa_store.job.layout import Layout, layout_from_json
from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.connection import text


class StoredDocuments:
    """Those of one job. For one thread. ``caller`` stays the store's."""

    def __init__(self, caller: Caller, job: str, set_aside: Callable[[Damaged], None]) -> None:
        self._caller = caller
        self._set_aside = set_aside
        self._job = job
        self._whole = ""
        """Digest of the text that was found to be the layout of the job."""

    def config(self) -> str | None:
        """The stored configuration, whatever it says; None if there is none."""
        found = self._caller.retrying(lambda: self._caller.client.get(keys.config(self._job)))
        return None if found is None else text(found)

    def layout(self) -> str | None:
        """The stored layout, which may be long."""
        found = self._caller.retrying(lambda: self._caller.client.get(keys.layout(self._job)))
        return None if found is None else text(found)

    def keep_layout(self, layout: Layout) -> None:
        """Write the layout of the job again where it is damaged, that of another model, or alone missing.

        Cheap where all is well: the text, which may be long, is read only where it is another one than before.
        """
        digest = self.layout_digest()
        if digest and digest == self._whole:
            return
        if not digest and self.config() is None:
            return  # Redis was wiped, or the job is removed
        where, stored = keys.layout(self._job), self.layout()
        found = Damaged(where, "it is missing") if stored is None else judged(layout_from_json, stored, where)
        if isinstance(found, Layout) and found.fingerprint == layout.fingerprint:
            self._whole = digest
            return
        self._set_aside(found if isinstance(found, Damaged) else Damaged(where, "it is that of another model"))
        self.overwrite(layout=layout.to_json())

    def layout_digest(self) -> str:
        """Tells whether the stored layout is still the same, without reading it; empty if there is none."""
        (digest,) = self._caller.functions([("psa_digest", [keys.layout(self._job)], [])], durable=False)
        return text(digest)

    def overwrite(self, *, config: str | None = None, layout: str | None = None) -> None:
        """Store these, whatever stands in their place: that was found damaged."""
        for key, document in ((keys.layout(self._job), layout), (keys.config(self._job), config)):
            if document is not None:
                self._caller.retrying(partial(self._caller.client.set, key, document))

    def restore(self, config: str, layout: str) -> None:
        """Store what is missing of them; the layout first, as their creator does."""
        self._caller.retrying(lambda: self._caller.client.sadd(keys.JOBS, self._job))
        for key, document in ((keys.layout(self._job), layout), (keys.config(self._job), config)):
            self._caller.retrying(partial(self._caller.client.set, key, document, nx=True))
