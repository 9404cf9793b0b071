"""What somebody who wants a checkpoint writes into ZooKeeper, and what he is answered."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from psa_store.errors import DataIntegrity


@dataclass(frozen=True, slots=True)
class Wish:
    """It lies there until the checkpoint is taken, or he waits no longer."""

    named: bool = False
    """Whether a person gave the name."""
    failed: str = ""
    """The answer, if it cannot be."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def wish_from_json(text: str) -> Wish:
    """Rebuild a wish; raises DataIntegrity if the text is not one."""
    try:
        return Wish(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataIntegrity(f"a wish for a checkpoint cannot be read: {error}") from error
