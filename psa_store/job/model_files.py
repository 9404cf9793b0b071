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


def _unpacked(value: object) -> object:
    """The bytes of a file, from its text in the document; what is bytes already stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return zlib.decompress(base64.b64decode(value, validate=True))
    except zlib.error as error:
        raise ValueError(str(error)) from error


def _packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


_Content = Annotated[bytes, BeforeValidator(_unpacked), PlainSerializer(_packed)]

CONFIG = "config.json"
_DTYPES = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """``contents``: of each file, by its name."""

    FORMAT: ClassVar[int] = 1

    contents: Mapping[str, _Content]

    def __post_init__(self) -> None:
        for name in self.contents:
            if not name or name.startswith(".") or "/" in name:
                raise UsageError(f"{name!r} is no name of a file of a model")

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
