"""What somebody who wants a checkpoint writes into ZooKeeper, and what he is answered."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from psa_store.errors import DataIntegrity


@dataclass(frozen=True, slots=True)
class CheckpointRequest:
    """It lies there until the checkpoint is taken, or he waits no longer."""

    named: bool = False
    """Whether a person gave the name."""
    failed: str = ""
    """The answer, if it cannot be."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def request_from_json(text: str) -> CheckpointRequest:
    """Rebuild a wish; raises DataIntegrity if the text is not one."""
    try:
        return CheckpointRequest(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataIntegrity(f"a wish for a checkpoint cannot be read: {error}") from error
