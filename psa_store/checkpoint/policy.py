"""When checkpoints are taken without being asked for, and how many of these are kept."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from psa_store.checkpoint.catalog import Checkpoint, read_job, remove, sweep
from psa_store.config import Settings
from psa_store.job.layout import Layout
from psa_store.storage import RedisStore


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """What the settings say of automatic checkpoints, and where all checkpoints go besides."""

    every_s: float | None
    keep: int
    older_than_s: float | None
    files: str | None

    @classmethod
    def from_settings(cls, settings: Settings) -> CheckpointPolicy:
        return cls(
            every_s=settings.checkpoint_every_s,
            keep=settings.checkpoint_keep,
            older_than_s=settings.checkpoint_keep_s,
            files=settings.checkpoint_files,
        )

    @property
    def automatic(self) -> bool:
        return self.every_s is not None


def tidy(store: RedisStore, job: str, layout: Layout, policy: CheckpointPolicy) -> None:
    """Remove automatic checkpoints that are not to be kept, and what attempts that were cut off have left."""
    checkpoints = read_job(store, job).checkpoints.values()
    remove(store, job, layout, superfluous(checkpoints, keep=policy.keep, older_than_s=policy.older_than_s))
    sweep(store, job, layout)


def superfluous(checkpoints: Iterable[Checkpoint], *, keep: int | None, older_than_s: float | None) -> list[str]:
    """Which of those that no person named are to go: all but the newest ``keep``, and those of more than this age."""
    candidates = sorted((each for each in checkpoints if not each.named), key=lambda each: each.created_s)
    beyond = candidates[:-keep] if keep else candidates if keep == 0 else []
    old = [each for each in candidates if older_than_s is not None and time.time() - each.created_s > older_than_s]
    return list(dict.fromkeys(each.name for each in (*beyond, *old)))
