"""The document that holds the small files of a job's model, beside their digest, so that few ever read the whole.

Written whole; of two writers the later one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psa_store.errors import UsageError
from psa_store.job.document import from_text, to_text
from psa_store.job.model_files import ModelFiles
from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.connection import text

VALUE_BYTES_MAX = 16 << 20
"""Redis does nothing else while it takes a value. Tokenizers of 250,000 words need half of it."""
_DIGEST, _DOCUMENT = "digest", "document"


class StoredModelFiles:
    """Those of one job. Thread-safe. ``caller`` stays the store's."""

    def __init__(self, caller: Caller, job: str) -> None:
        self._caller = caller
        self._job = job
        self._key = keys.model_files(job)

    def digest(self) -> str:
        """That of the stored files; empty if there are none."""
        found = self._caller.retrying(lambda: self._caller.client.hget(self._key, _DIGEST))
        return "" if found is None else text(found)

    def read(self) -> ModelFiles | None:
        """All of them; None if there are none."""
        found = self._caller.retrying(lambda: self._caller.client.hget(self._key, _DOCUMENT))
        return None if found is None else from_text(ModelFiles, text(found), f"job {self._job!r}: files of its model")

    def write(self, files: ModelFiles) -> None:
        """Store these in place of all others. Idempotent.

        Raises:
            UsageError: they are too large.
        """
        document = to_text(files)
        if len(document) > VALUE_BYTES_MAX:
            largest = max(files.contents, key=lambda name: len(files.contents[name]))
            raise UsageError(
                f"the files of the model and its tokenizer need {len(document):,} bytes in Redis, compressed, and at "
                f"most {VALUE_BYTES_MAX:,} are kept with a job; the largest is {largest!r}. Leave the tokenizer out, "
                "and put its files into exports yourself: tokenizer.save_pretrained(folder)"
            )
        fields: Mapping[Any, Any] = {_DIGEST: files.digest, _DOCUMENT: document}
        self._caller.retrying(lambda: self._caller.client.hset(self._key, mapping=fields))
