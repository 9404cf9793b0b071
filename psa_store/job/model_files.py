"""Small files that loaders of a model want beside its tensors: its configuration, its tokenizer. A document of the job.

Workers store it, exports write the files as they are. Pure: no I/O, no threads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, PlainSerializer

from psa_store.errors import UsageError

FILES_BYTES_MAX = 256 << 20
"""Of all of them together: a small document can say that it unpacks to any length."""


def _unpacked(value: object) -> object:
    """The files, from their texts in the document; what is bytes already stays as it is."""
    if not isinstance(value, Mapping):
        return value
    found, left = {}, FILES_BYTES_MAX
    for name, text in value.items():
        found[name] = _unpacked_file(text, left) if isinstance(text, str) else text
        left -= len(found[name]) if isinstance(text, str) else 0
    return found


def _unpacked_file(text: str, bytes_max: int) -> bytes:
    """Raises ValueError if that is no such text, or it becomes longer than this."""
    unpacking = zlib.decompressobj()
    try:
        content = unpacking.decompress(base64.b64decode(text, validate=True), bytes_max + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(content) > bytes_max or not unpacking.eof:
        raise ValueError("it is torn, or unpacks to more than a job keeps")
    return content


def _packed(contents: Mapping[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(zlib.compress(content)).decode() for name, content in contents.items()}


CONFIG = "config.json"
_DTYPES = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """``contents``: of each file, by its name."""

    FORMAT: ClassVar[int] = 1

    contents: Annotated[Mapping[str, bytes], BeforeValidator(_unpacked), PlainSerializer(_packed)]

    def __post_init__(self) -> None:
        for name in self.contents:
            if not name or name.startswith(".") or "/" in name:
                raise UsageError(f"{name!r} is no name of a file of a model")
        size_bytes = sum(len(content) for content in self.contents.values())
        if size_bytes > FILES_BYTES_MAX:
            raise UsageError(f"the files of the model have {size_bytes:,} bytes, at most {FILES_BYTES_MAX:,} are kept")

    @property
    def digest(self) -> str:
        """Tells whether two documents have the same files."""
        total = hashlib.sha256()
        for name, content in sorted(self.contents.items()):
            total.update(f"{name}/{len(content)}/".encode())
            total.update(content)
        return total.hexdigest()

    def without_dtype(self) -> ModelFiles:
        """The same for tensors of another dtype than the model has: loaders take what the tensors have."""
        if CONFIG not in self.contents:
            return self
        config = {name: value for name, value in json.loads(self.contents[CONFIG]).items() if name not in _DTYPES}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        return ModelFiles({**self.contents, CONFIG: text.encode()})
